"""The report's sampled figures against plain loops over a few thousand tokens."""

from types import SimpleNamespace

import numpy as np
import pytest

from tokenclean_ray import report, report_data
from tokenclean_ray.finished import Chosen

CUT = -0.25


@pytest.fixture(scope="module")
def drawn():
    """Token ids, losses under base and reference, scores, and which tokens are kept."""
    rng = np.random.default_rng(0)
    ids = rng.integers(280, 320, 2000)
    base, reference = (rng.exponential(scale, 2000).astype(np.float32) for scale in (2, 1))
    score = base - reference
    return ids, base, reference, score, score >= CUT


def test_the_histogram_s_kept_tokens_lie_above_the_cut(drawn):
    *_, score, keep = drawn
    bins = report_data._scores(score, keep)["bins"]
    assert sum(bin["kept"] + bin["dropped"] for bin in bins) == 2000
    for bin in bins[1:-1]:
        inside = (score >= bin["low"]) & (score < bin["high"])
        assert (bin["kept"], bin["dropped"]) == pytest.approx(((inside & keep).sum(), (inside & ~keep).sum()), abs=1)
    assert bins[0]["kept"] == bins[-1]["dropped"] == 0


def test_cells_of_the_grid_against_a_plain_count(drawn):
    _, base, reference, _, keep = drawn
    part = SimpleNamespace(losses={"base": base, "reference": reference})
    cells = report_data._losses([part], keep)
    step = cells[0]["step"]
    assert sum(cell["tokens"] for cell in cells) == 2000
    inner = [c for c in cells if max(c["base"], c["reference"]) < (report_data.LOSS_BINS - 1.5) * step]
    assert len(inner) > 100
    for cell in inner:
        inside = (base // step == round(cell["base"] / step)) & (reference // step == round(cell["reference"] / step))
        assert cell["tokens"] == pytest.approx(inside.sum(), abs=1)  # the step has four digits
        if cell["tokens"] == inside.sum():
            assert cell["share"] == pytest.approx(keep[inside].mean(), abs=1e-3)


def test_tokens_most_kept_and_most_dropped_against_a_plain_ranking(drawn, tokenizer):
    ids, _, _, score, keep = drawn
    found = report_data._tokens(SimpleNamespace(tokenizer=tokenizer), ids, score, keep)
    rows = {}
    for token in sorted(set(ids.tolist())):
        of = ids == token
        surprise = (keep[of].sum() - keep.mean() * of.sum()) / np.sqrt(of.sum())
        rows[token] = (surprise, int(of.sum()), int(keep[of].sum()), score[of].mean())
    best = sorted(rows.values(), reverse=True)
    for kind, ranked, sign in (("kept", best, 1), ("dropped", best[::-1], -1)):
        expected = [row for row in ranked if sign * row[0] > 0][: report_data.NUM_TOKENS]
        assert [(row["seen"], row["kept"]) for row in found[kind]] == [row[1:3] for row in expected]
        assert [row["score"] for row in found[kind]] == pytest.approx([row[3] for row in expected], rel=1e-3)


# -- cuts --------------------------------------------------------------------------------------------------------


def chosen(round, scores):
    cuts = {source: {"score": score} for source, score in scores.items()}
    return Chosen(round, {"cuts": cuts} if "" not in scores else {"score": scores[""]}, [])


def some_examples(names):
    return [{"round": round, "source": name, "pieces": []} for round in (0, 3) for name in names]


def test_many_sources_leave_the_page_small_and_every_row_its_cut():
    """A thousand names as long as they may be, of six bytes a character, in each of four rounds."""
    names = [f"{n:04d}" + "源" * 196 for n in range(1000)]
    selections = [chosen(round, {name: round + n / 1000 for n, name in enumerate(names)}) for round in range(4)]
    examples = some_examples(names[500:530])
    cuts = report_data._cuts(selections, examples)
    found = {(cut["round"], cut["source"]): cut["score"] for cut in cuts}
    for row in examples:
        assert found[row["round"], row["source"]] == row["round"] + int(row["source"][:4]) / 1000
    assert [cut["score"] for cut in cuts[:13]] == [n / 1000 for n in range(13)]  # of which the page lists 12, and "…"
    assert len(report._json({"cuts": cuts})) < 200_000


def test_every_round_that_has_one_cut_keeps_it():
    """The line in the chart of losses is that of the last."""
    cuts = report_data._cuts([chosen(round, {"": round / 10}) for round in range(20)], some_examples(["a"]))
    assert [(cut["round"], cut["score"]) for cut in cuts] == [(round, round / 10) for round in range(20)]
