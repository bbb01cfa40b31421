"""The guard, without training: what is measured of each round is given."""

from types import SimpleNamespace

import pytest

from tokenclean_ray import loop
from tokenclean_ray.config import Select
from tokenclean_ray.held_out import HeldOut


@pytest.fixture
def take_turns(monkeypatch):
    """A plan of as many rounds as there are held-out losses, and one more; all begin with a model of loss 1."""

    def take(losses):
        of = {"first": 1.0} | {str(n): loss for n, loss in enumerate(losses)}
        models = (SimpleNamespace(path=str(n)) for n in range(len(losses)))
        chosen = SimpleNamespace(name="s", threshold={"kept": 6, "tokens": 10}, select=Select())
        manifest = {"tokens": 6, "seconds": 1.0, "loss": [1.0]}
        monkeypatch.setattr(loop.settle, "score_and_settle", lambda *_: ({}, Select(), None))
        monkeypatch.setattr(loop, "find_selection", lambda *_: chosen)
        monkeypatch.setattr(loop, "train_on", lambda *_: (next(models), manifest))
        monkeypatch.setattr(loop.Loop, "_agreement", lambda *_: None)

        def judge(run, parts, model, best):
            return HeldOut(of[model.path], 0.1, of[model.path] - of[best.path], 0.03, of[best.path], 0.1)

        monkeypatch.setattr(loop, "judge", judge)
        config = SimpleNamespace(evolve=SimpleNamespace(guard=True))
        turns = loop.Loop(
            SimpleNamespace(base=SimpleNamespace(path="base"), config=config),
            {"held": {}},
            SimpleNamespace(path="first"),
        )
        rounds = [loop.Round("self_evolving", n, (n,), Select(), "newest", "newest") for n in range(len(losses))]
        return [turns.turn(one, {}) for one in rounds], turns

    return take


def test_a_refusal_before_an_accepted_round_is_forgotten(take_turns):
    outcomes, turns = take_turns([0.9, 0.95, 0.8, 0.95, 0.7])
    assert [one["accepted"] for one in outcomes] == [True, False, True, False, True]
    assert turns.newest.path == "4"
    assert turns.comparison[0]["accepted"] == 3


def test_a_slow_decline_is_judged_by_the_best_model_and_two_refusals_in_a_row_end_the_plan(take_turns, capfd):
    outcomes, turns = take_turns([0.9, 0.92, 0.94, 0.96, 0.5])
    assert [one and one["accepted"] for one in outcomes] == [True, True, False, False, None]
    assert turns.newest.path == "1"
    told = capfd.readouterr().err.splitlines()
    assert [line.strip() for line in told if "refused" in line] == [
        "refused: worse than the best accepted model by 0.0400 ± 0.0300 nats; the reference stays",
        "refused: worse than the best accepted model by 0.0600 ± 0.0300 nats; the reference stays",
        "self_evolving round 4 is left out: 2 rounds in a row were refused",
    ]
