"""What changed between two snapshots, against plain loops over rows that are known by a number of their own."""

import numpy as np
import pytest
from conftest import write_scored

from tokenclean_ray import changes
from tokenclean_ray.changes import COUNTS, count_changes, distance, pair_up
from tokenclean_ray.config import Select
from tokenclean_ray.layout import Store
from tokenclean_ray.parts import publish_part
from tokenclean_ray.selection import Cut, order_key

SELECT = Select(scorer="base_loss")
LOSSES = {"base": "losses/base"}


def cut_at(score):
    return {"": Cut(int(order_key(np.array([score], np.float32))[0]), 0)}


def write(store, part, rows):
    """rows: (token ids, losses), the first token a prompt's."""
    masks = [[False] + [True] * (len(ids) - 1) for ids, _ in rows]
    write_scored(store, part, [ids for ids, _ in rows], masks, base=[[0.0, *loss[1:]] for _, loss in rows])


def random_rows(count, generator, ids=5):
    """Few different ids, so that rows repeat; scores that 16 bits hold."""
    sizes = generator.integers(2, 5, count)
    return [(generator.integers(0, ids, n).tolist(), (generator.integers(0, 16, n) / 4).tolist()) for n in sizes]


def expected(before, after, cuts):
    """By loops: rows of equal tokens are matched in order, first with first."""
    left = list(before)
    counts = dict.fromkeys(COUNTS, 0)
    known, new = [], []
    for ids, losses in after:
        found = next((row for row in left if row[0] == ids), None)
        scores = losses[1:]
        if found is None:
            counts["rows_new"] += 1
            new += scores
            continue
        left.remove(found)
        counts["rows_unchanged"] += 1
        known += scores
        for was, now in zip(found[1][1:], scores, strict=True):
            counts["labels_gained"] += was < cuts[0] and now >= cuts[1]
            counts["labels_lost"] += was >= cuts[0] and now < cuts[1]
    counts["rows_removed"] = len(left)
    return counts, known, new


def ks(one, other):
    return max(abs(np.mean(np.array(one) <= x) - np.mean(np.array(other) <= x)) for x in [*one, *other])


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_known_by_their_tokens_whatever_part_they_are_in(tmp_path, seed):
    generator = np.random.default_rng(seed)
    store = Store(str(tmp_path))
    before, added = random_rows(60, generator), random_rows(30, generator, ids=9)
    after = [*before[12:], *added]
    sides = {}
    for name, rows, cut in (("masked/v0001", before, 1.5), ("masked/v0002", after, 2.5)):
        sides[name] = [f"part-{generator.integers(1 << 62):016x}" for _ in range(3)]
        for n, part in enumerate(sides[name]):
            third = len(rows) // 3
            write(store, part, rows[n * third : (n + 1) * third])
            publish_part(store, name, part, LOSSES, SELECT, cut_at(cut), {})
    found = count_changes(store, tuple(sides.values()), tuple(sides), LOSSES, SELECT)
    counts, known, new = expected(before, after, (1.5, 2.5))
    assert dict(zip(COUNTS, found["counts"].tolist(), strict=True)) == counts
    assert min(counts["rows_new"], counts["rows_removed"], counts["labels_lost"]) > 0
    assert (found["known"].sum(), found["new"].sum()) == (len(known), len(new))
    assert distance(found["known"], found["new"]) == pytest.approx(ks(known, new))


@pytest.mark.parametrize("cuts", [(2.0, 1.0), (1.0, 2.0)])
def test_a_part_that_both_have_is_compared_row_by_row(tmp_path, cuts):
    store, rows, part = Store(str(tmp_path)), random_rows(40, np.random.default_rng(0)), f"part-{7:016x}"
    write(store, part, rows)
    folders = "masked/v0001", "masked/v0002"
    for folder, cut in zip(folders, cuts, strict=True):
        publish_part(store, folder, part, LOSSES, SELECT, cut_at(cut), {})
    found = count_changes(store, ([part], [part]), folders, LOSSES, SELECT)
    counts, known, _ = expected(rows, rows, cuts)
    assert counts["labels_gained"] + counts["labels_lost"] > 5
    assert counts["rows_unchanged"] == 40
    assert dict(zip(COUNTS, found["counts"].tolist(), strict=True)) == counts
    np.testing.assert_array_equal(found["known"], changes.first_digits(order_key(np.array(known, np.float32))))
    assert distance(found["known"], found["new"]) is None


def test_parts_that_changed_are_compared_with_those_of_their_file(monkeypatch):
    removed = {"a1": "a", "b1": "b"}
    added = {"a2": "a", "c1": "c", "a3": "a", "a4": "a", "c2": "c"}
    pairs = pair_up(removed, added, ["x"])
    assert pairs == [
        (["x"], ["x"]),
        (["a1"], ["a2", "a3"]),
        ([], ["a4"]),
        (["b1"], []),
        ([], ["c1"]),
        ([], ["c2"]),
    ]
    monkeypatch.setattr(changes, "MOST_PARTS", 2)
    for few, many in ((3, 7), (7, 3), (4, 4), (2, 2)):
        before, after = ({f"{side}{n}": "f" for n in range(size)} for side, size in (("b", few), ("a", many)))
        pairs = pair_up(before, after, [])
        assert [part for pair in pairs for part in pair[0]] == list(before)
        assert [part for pair in pairs for part in pair[1]] == list(after)
        assert all(len(parts) <= 2 for pair in pairs for parts in pair)
