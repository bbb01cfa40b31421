"""The exact cut against a full sort, whatever the partitioning and however many scores tie."""

import uuid

import numpy as np
import oracle
import pyarrow as pa
import pytest
from conftest import write_scored
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenclean_ray import selection
from tokenclean_ray.config import Select
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.parts import publish_part
from tokenclean_ray.tokens import PartTokens, part_tokens


@pytest.fixture(autouse=True, scope="module", params=[0, 20, 2000, selection.FEW], ids=lambda few: f"few={few}")
def few(request):
    """Cuts found by counting alone, by both, by what a sample is right or wrong about, and by looking at all tokens."""
    before, selection.FEW = selection.FEW, request.param
    yield request.param
    selection.FEW = before


PARTS = ["part-00000000000000aa", "part-0123456789abcdef", "part-ffffffffffffffff"]


class Pool:
    """Response tokens spread over parts, as the pipeline sees them."""

    groups = ("",)

    def __init__(self, scores, part_of, row_of):
        self.parts = {}
        self.tokens = {}
        counts = {}
        for score, part, row in zip(scores, map(int, part_of), map(int, row_of), strict=True):
            position = counts[part, row] = counts.get((part, row), 0) + 1
            self.tokens[PARTS[part], row, position] = float(np.float32(score) + np.float32(0))
        for part in PARTS:
            members = sorted((i, s) for i, s in self.tokens.items() if i[0] == part)
            row = np.array([i[1] for i, _ in members], np.int64)
            position = np.array([i[2] for i, _ in members], np.int64)
            key = selection.order_key(np.array([s for _, s in members], np.float32))
            self.parts[part] = (key, row, position)

    def tie(self, part):
        _, row, position = self.parts[part]
        return lambda at: selection.mix(part, row[at], position[at])

    def look(self, wanted, gathered, every):
        """By group: all tokens, or those of each part."""
        every_group = {group: {()} for group in self.groups if group in ("", *PARTS[::every])}
        counts = self._of_each(every_group if wanted is None else wanted, selection.histogram, sum, every)
        return counts, self._of_each(gathered, selection.gather, np.concatenate, every)

    def _of_each(self, wanted, what, join, every):
        return {
            (group, which): join(
                [what(self.parts[p][0], self.tie(p), which) for p in (PARTS[::every], [group])[bool(group)]]
            )
            for group, some in wanted.items()
            for which in some
        }

    def find_cut(self, ratio):
        found = selection.find_cuts(self.look, [ratio])["", ratio]
        return found.cut, found.k

    def kept(self, cut):
        return self._identities(lambda part: selection.keep_global(self.parts[part][0], self.tie(part), cut))

    def kept_per_row(self, ratio):
        def keep(part):
            key, row, _ = self.parts[part]
            return selection.keep_per_row(key, self.tie(part)(np.arange(len(key))), row, ratio)

        return self._identities(keep)

    def _identities(self, keep):
        found = set()
        for part, (_, row, position) in self.parts.items():
            chosen = keep(part)
            found |= {(part, int(r), int(p)) for r, p in zip(row[chosen], position[chosen], strict=True)}
        return found


def pool(seed, count, values=None):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=count) if values is None else generator.choice(values, count)
    return Pool(scores, generator.integers(0, 3, count), generator.integers(0, 5, count))


@pytest.mark.parametrize(
    "values",
    [None, [0.0], [0.0, -0.0], [1.0, 1.0, 2.0], [np.inf, -np.inf, 0.0], [1e-45, -1e-45, 0.0], [1.0, 1.0 + 2**-23]],
)
@pytest.mark.parametrize("ratio", [0.001, 0.3, 0.6, 0.999, 1.0])
def test_exactly_the_top_k(values, ratio):
    data = pool(0, 2000, values)
    k = selection.keep_count(ratio, 2000)
    eligible = sum(score > -np.inf for score in data.tokens.values())
    cut, count = data.find_cut(ratio)
    kept = data.kept(cut)
    assert len(kept) == count == min(k, eligible)
    assert kept == oracle.kept_tokens(data.tokens, ratio)


def test_where_all_scores_are_minus_infinity_nothing_is_kept():
    data = pool(0, 100, [-np.inf])
    cut, count = data.find_cut(0.6)
    assert count == 0
    assert data.kept(cut) == data.kept_per_row(0.6) == set()


@pytest.mark.parametrize("scope", ["global", "sample"])
@pytest.mark.parametrize("values", [[0.0, -np.inf], [3.0, 1.0, -np.inf, -np.inf]])
def test_ruled_out_tokens_leave_the_others_their_share(scope, values):
    """The ratio is of all tokens, and an upper limit."""
    data = pool(5, 400, values)
    eligible = {i for i, score in data.tokens.items() if score > -np.inf}
    for ratio in (0.1, 0.4, 0.9):
        kept = data.kept_per_row(ratio) if scope == "sample" else data.kept(data.find_cut(ratio)[0])
        assert kept == oracle.kept_tokens(data.tokens, ratio, scope)
        assert kept <= eligible
    assert kept == eligible


scores = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, 1.0])
rows = st.lists(st.tuples(scores, st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=60)
ratios = st.floats(0.01, 1.0).map(lambda r: round(r, 3))


@settings(max_examples=60, deadline=None)
@given(rows=rows, ratio=ratios)
def test_any_scores_any_partitioning(rows, ratio):
    data = Pool(*zip(*rows, strict=True))
    assert data.kept_per_row(ratio) == oracle.kept_tokens(data.tokens, ratio, "sample")
    assert data.kept(data.find_cut(ratio)[0]) == oracle.kept_tokens(data.tokens, ratio)


def recorded(data):
    """A pool's `look`, and what it was asked: digits of prefixes, or None for all groups; tokens gathered; parts left
    out."""
    asked = []

    def look(wanted, gathered, every):
        counts, places = data.look(wanted, gathered, every)
        digits = wanted and {len(prefix) for prefixes in wanted.values() for prefix in prefixes}
        asked.append((digits, sum(map(len, places.values())), every > 1))
        return counts, places

    return look, asked


def test_few_passes_where_nothing_ties_however_many_ratios(few):
    data = pool(1, 3000)
    look, asked = recorded(data)
    ratios = [n / 10 for n in range(1, 10)]
    found = selection.find_cuts(look, ratios)
    (digits, gathered, sample), (all_digits, near, _), *more = asked
    assert (digits, gathered, sample, all_digits) == (None, 0, True, None)
    assert not any(sample for _, _, sample in asked[1:])
    assert sum(gathered for _, gathered, _ in asked) <= few
    if few > 2000:
        assert near == 3000  # all tokens are few
        assert not more
    else:
        assert [digits for digits, _, _ in more] == [{}] if few > 20 else [{1}]
    for ratio in ratios:
        assert data.kept(found["", ratio].cut) == oracle.kept_tokens(data.tokens, ratio)


@pytest.mark.parametrize(
    ("away", "passes"), [(0.0, 1), (9.0, 2), (-9.0, 2)], ids=["like the others", "higher", "lower"]
)
def test_one_pass_where_the_sampled_part_is_like_the_others(monkeypatch, away, passes):
    monkeypatch.setattr(selection, "FEW", 4000)
    generator = np.random.default_rng(3)
    part_of = generator.integers(0, 3, 30_000)
    data = Pool(generator.normal(size=30_000) + away * (part_of == 0), part_of, generator.integers(0, 5, 30_000))
    look, asked = recorded(data)
    cut = selection.find_cuts(look, [0.6])["", 0.6].cut
    assert data.kept(cut) == oracle.kept_tokens(data.tokens, 0.6)
    assert len(asked) == 1 + passes
    assert all(gathered <= 4000 for _, gathered, _ in asked)


def test_each_ratio_has_a_place_to_look_at_also_where_most_tokens_are_ruled_out(monkeypatch):
    monkeypatch.setattr(selection, "FEW", 1 << 22)
    counts = np.zeros(1 << 16, np.int64)
    counts[40_000:50_000] = 100
    assert len(selection._near_cuts({("", ()): counts}, [n / 10 for n in range(1, 10)])[""]) == 9
    counts = np.zeros(1 << 16, np.int64)
    counts[selection.LOWEST - 1], counts[40_000:40_010] = 10**6, 10
    ((first, last),) = selection._near_cuts({("", ()): counts}, [0.6])[""]
    assert first >> 80 >= selection.LOWEST
    assert last >> 80 >= 40_000


def test_places_of_which_some_were_let_go_are_gathered_again(monkeypatch):
    monkeypatch.setattr(selection, "FEW", 3000)
    data, times = pool(1, 3000), []

    def look(wanted, gathered, every):
        counts, places = data.look(wanted, gathered, every)
        times.append(every)
        if len(times) == 2:
            assert sum(map(len, places.values())) > 100
            places = {key: found[::2] for key, found in places.items()}
        return counts, places

    cut = selection.find_cuts(look, [0.6])["", 0.6].cut
    assert data.kept(cut) == oracle.kept_tokens(data.tokens, 0.6)
    assert times == [selection.SAMPLE, 1, 1]


def test_losses_that_change_meanwhile_end_the_search(monkeypatch):
    monkeypatch.setattr(selection, "FEW", 3000)
    data = pool(1, 3000)

    def look(wanted, gathered, every):
        counts, places = data.look(wanted, gathered, every)
        return counts, {key: found[:0] for key, found in places.items()}

    with pytest.raises(UserError, match="losses changed while their cut was looked for"):
        selection.find_cuts(look, [0.6])


def test_more_places_than_were_meant_to_be_gathered_are_let_go(monkeypatch):
    monkeypatch.setattr(selection, "FEW", 10)
    places = {("", (0, 9)): np.zeros((8, 2), np.uint64)}
    for times, left in ((2, 16), (3, None), (4, 8)):
        counts, found = selection.add_up(({("", ()): np.ones(2, np.int64)}, places) for _ in range(times))
        assert counts["", ()].tolist() == [times, times]
        assert {key: len(some) for key, some in found.items()} == ({("", (0, 9)): left} if left else {})


@pytest.mark.parametrize("values", [None, [0.0], [1.0, -np.inf]])
def test_each_group_has_its_own_cut(values):
    data = pool(8, 2000, values)
    data.groups = PARTS
    found = selection.find_cuts(data.look, [0.25, 0.6])
    assert found.keys() == {(part, ratio) for part in PARTS for ratio in (0.25, 0.6)}
    for (part, ratio), one in found.items():
        tokens = {i: score for i, score in data.tokens.items() if i[0] == part}
        kept = {i for i in data.kept(one.cut) if i[0] == part}
        assert kept == oracle.kept_tokens(tokens, ratio)
        assert (one.k, one.tokens) == (len(kept), len(tokens))


def test_order_key_sorts_as_scores_do():
    scores = np.array([-np.inf, -3.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, 2.0000002, np.inf], np.float32)
    keys = selection.order_key(scores)
    assert (np.diff(keys.astype(np.int64)) > 0).tolist() == [True, True, True, False, True, True, True, True]
    np.testing.assert_array_equal(selection.key_score(keys), scores + 0)


@pytest.mark.parametrize(
    ("ratio", "tokens", "k"),
    [(0.29, 100, 29), (0.6, 5, 3), (0.6, 4, 2), (0.57, 100, 57), (1, 7, 7), (0.1 * 3, 1230, 369)],
)
def test_k_is_the_floor_of_the_written_ratio(ratio, tokens, k):
    assert selection.keep_count(ratio, tokens) == k
    assert selection.keep_count(ratio, np.array([tokens, 0])).tolist() == [k, 0]


def test_ties_favour_no_part_row_or_position():
    data = pool(2, 6000, [0.0])
    kept = data.kept(data.find_cut(0.5)[0])
    for axis, middle in ((0, PARTS[1]), (1, 2), (2, 200)):
        share = np.mean([i in kept for i in data.tokens if i[axis] <= middle])
        assert 0.46 < share < 0.54


def test_full_keeps_everything():
    data = pool(6, 300)
    cut, count = data.find_cut(1.0)
    assert count == 300
    assert data.kept(cut) == set(data.tokens)


@settings(max_examples=60, deadline=None)
@given(rows=rows, two=st.tuples(ratios, ratios).map(sorted))
def test_a_larger_ratio_keeps_what_a_smaller_one_keeps(rows, two):
    data = Pool(*zip(*rows, strict=True))
    assert data.kept_per_row(two[0]) <= data.kept_per_row(two[1])
    found = selection.find_cuts(data.look, two)
    assert data.kept(found["", two[0]].cut) <= data.kept(found["", two[1]].cut)


LOSSES = {"base": "losses/base", "reference": "losses/reference"}
SCORERS = st.sampled_from(
    [
        {"scorer": "excess_loss"},
        {"scorer": "probability", "above": 0.2},
        {"scorer": "gated_excess_loss", "strict": True},
    ]
)
masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=8).map(lambda m: [False, *m]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), masks=masks, settings_of=SCORERS, ratio=ratios, scope=st.sampled_from(["global", "sample"]))
def test_what_is_published_is_what_the_oracle_keeps(data, masks, settings_of, ratio, scope):
    """From files of tokens and losses to a file of labels, any masks and losses, many of them equal."""
    store, part = Store(f"memory://{uuid.uuid4()}"), PARTS[1]
    select = Select(**settings_of, keep_ratio=ratio, scope=scope)
    loss = (st.sampled_from([0.0, 0.5, 3.0]) | st.floats(0, 9)).map(lambda value: float(np.float32(value)))
    drawn = {name: [[data.draw(loss) for _ in m] for m in masks] for name in LOSSES}
    write_scored(store, part, [list(range(5, 5 + len(m))) for m in masks], masks, **drawn)
    tokens = {
        (part, n, int(t)): {name: drawn[name][n][t] for name in LOSSES}
        for n, m in enumerate(masks)
        for t in np.flatnonzero(m)
    }
    found = part_tokens(store, part, LOSSES, select)
    scores = dict(zip(sorted(tokens), map(float, found.score), strict=True))
    for identity, token in tokens.items():
        assert scores[identity] == pytest.approx(oracle.score(settings_of, token), rel=1e-5, abs=1e-6)
    cuts = None
    if scope == "global":

        def look(wanted, gathered, _):
            return found.look(scope, wanted, gathered)

        cuts = {"": selection.find_cuts(look, [ratio])["", ratio].cut}
    summary = publish_part(store, "masked", part, LOSSES, select, cuts, {})
    published = store.read_part("masked", part).to_pylist()
    kept = {(part, r["row"], t) for r in published for t, label in enumerate(r["labels"]) if label != -100}
    assert kept == oracle.kept_tokens(scores, ratio, scope)
    assert summary["rows"] + summary["nothing_kept"] == len(masks)
    assert summary["rows"] == len(published)
    for row in published:
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@pytest.mark.parametrize(
    ("role", "settings_of"),
    [
        ("base", {"scorer": "excess_loss"}),
        ("base", {"scorer": "gated_excess_loss"}),
        ("base", {"scorer": "gated_excess_loss", "strict": True}),
        ("base", {"scorer": "probability", "above": 0.4, "keep_ratio": 1}),
        ("reference", {"scorer": "excess_loss"}),
        ("reference", {"scorer": "gated_excess_loss"}),
        ("reference", {"scorer": "gated_excess_loss", "strict": True}),
    ],
)
def test_a_loss_that_is_no_number_is_named_wherever_the_score_hides_it(role, settings_of):
    store, part = Store(f"memory://{uuid.uuid4()}"), PARTS[0]
    losses = {name: [[0.0, 9.0, np.nan if (n, name) == (7, role) else 1.0] for n in range(9)] for name in LOSSES}
    write_scored(store, part, [[5, 6, 7]] * 9, [[False, True, True]] * 9, **losses)
    with pytest.raises(UserError, match=r"rows 7 … are not numbers"):
        part_tokens(store, part, LOSSES, Select(**settings_of))


def test_more_sources_than_there_is_memory_for_are_refused(monkeypatch):
    """Of many parts, and of one, before the first of them is counted."""
    parts = iter(range(9))
    with pytest.raises(UserError, match="there are more than 2,000: name fewer"):
        selection.add_up(({(f"s{part}-{n}", ()): np.ones(1) for n in range(500)}, {}) for part in parts)
    assert list(parts) == [5, 6, 7, 8]
    sources = pa.table({"source": [f"s{n}" for n in range(2001)]})
    tokens = PartTokens("part-0", sources, np.arange(2002), np.arange(2001), np.zeros(2001), np.zeros(2001, np.uint32))
    monkeypatch.setattr(selection, "histogram", lambda *of: pytest.fail("counted"))
    with pytest.raises(UserError, match="there are more than 2,000: name fewer"):
        tokens.look("source", None, {})
