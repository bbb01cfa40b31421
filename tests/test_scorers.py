"""Scores against the oracle's formulas, what each scorer reads, and what a gate does to the order."""

import numpy as np
import oracle
import pytest

from tokenclean_ray import scorers
from tokenclean_ray.config import Select

SETTINGS = [
    {"scorer": "excess_loss"},
    {"scorer": "gated_excess_loss"},
    {"scorer": "gated_excess_loss", "gate": 0.7, "strict": True},
    {"scorer": "gated_excess_loss", "gate_on": "surprise"},
    {"scorer": "gated_excess_loss", "gate_on": "surprise", "gate": 0.7, "strict": True},
    {"scorer": "gated_excess_loss", "gate_on": "rank", "gate": 2},
    {"scorer": "plausibility"},
    {"scorer": "plausibility", "gate_on": "surprise"},
    {"scorer": "plausibility", "gate_on": "rank"},
    {"scorer": "base_loss"},
    {"scorer": "probability", "above": 0.1, "below": 0.95},
    {"scorer": "probability", "above": 0.4},
    {"scorer": "entropy"},
    {"scorer": "random"},
    {"scorer": "full", "keep_ratio": 1},
]


def known(count=500):
    generator = np.random.default_rng(4)
    names = ("base", "reference", "base_entropy", "reference_entropy")
    return {name: generator.exponential(1.5, count).astype(np.float32) for name in names} | {
        "random": generator.random(count, np.float32),
        "reference_rank": generator.integers(0, 5, count).astype(np.float32),
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_scores_by_the_formulas(settings):
    select, tokens = Select(**settings), known()
    asked = {name: tokens[name] for name in scorers.statistics(select)}  # nothing that was not asked for is read
    found = scorers.SCORERS[select.scorer].score(asked, select)
    assert found.dtype == np.float32
    expected = [oracle.score(settings, {name: float(tokens[name][i]) for name in tokens}) for i in range(len(found))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_each_scorer_asks_for_what_it_reads():
    wanted = {
        "excess_loss": {"base", "reference"},
        "gated_excess_loss": {"base", "reference"},
        "plausibility": {"reference"},
        "base_loss": {"base"},
        "probability": {"base"},
        "entropy": {"base"},
        "random": set(),
        "full": set(),
    }
    assert wanted.keys() == scorers.SCORERS.keys()
    for scorer, models in wanted.items():
        select = Select(scorer=scorer, keep_ratio=1)
        assert scorers.models(select) == models
        assert scorers.beside_losses(select, "base") == (("entropy",) if scorer == "entropy" else ())
        assert scorers.beside_losses(select, "reference") == ()
    for gate_on, beside in (("surprise", "entropy"), ("rank", "rank")):
        gated = Select(scorer="gated_excess_loss", gate_on=gate_on)
        assert scorers.models(gated) == {"base", "reference"}
        assert scorers.beside_losses(gated, "reference") == (beside,)
        assert scorers.beside_losses(gated, "base") == ()


def test_every_token_in_the_gate_ranks_above_every_other():
    tokens = known(3000)
    score = scorers.SCORERS["gated_excess_loss"].score(tokens, Select(scorer="gated_excess_loss", gate=1.5))
    inside = tokens["reference"] < 1.5
    assert score[inside].min() > score[~inside].max()
    outside = np.flatnonzero(~inside)
    by_score, by_loss = outside[np.argsort(-score[outside])], outside[np.argsort(tokens["reference"][outside])]
    np.testing.assert_array_equal(by_score, by_loss)


def test_a_gate_that_fewer_tokens_pass_than_are_kept_decides_nothing():
    """Then the gated score keeps the most plausible tokens, whatever the gate and the base."""
    tokens = known(3000)
    kept = []
    for select in (Select(scorer="gated_excess_loss", gate=0.5), Select(scorer="plausibility")):
        score = scorers.SCORERS[select.scorer].score(tokens, select)
        kept.append(set(np.argsort(-score, kind="stable")[:1800].tolist()))
    assert (tokens["reference"] < 0.5).sum() < 1800
    assert kept[0] == kept[1]
