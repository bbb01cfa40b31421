"""One trial of the study: what is measured against plain loops and figures by hand, gates, ratios and rounds."""

import itertools
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from test_study import SMALL, TINY, per_row

from tokenclean_ray import planted
from tokenclean_ray.config import Select
from tokenclean_ray.held_out import REFUSALS
from tokenclean_ray.study import run as study
from tokenclean_ray.study import trial as study_trial
from tokenclean_ray.study.plans import PLANS, ROUNDS, Plan


@pytest.fixture(scope="module")
def trial():
    return study_trial.Trial(study.made_up_task(SMALL, 0), 0.6, 0)


def known_of(texts):
    generator = np.random.default_rng(0)
    return [
        {name: generator.exponential(2, len(texts.ids)).astype(np.float32) for name in study_trial.KNOWN}
        for _ in range(2)
    ]


def test_the_kept_tokens_are_the_oracles():
    texts = planted.World(0).texts(20, noise=0.3)
    known = study_trial.of_tokens(texts, *known_of(texts))
    for scope in ("global", "sample"):
        score, keep = study_trial.select_tokens(texts, known, Select(keep_ratio=0.3, scope=scope))
        row, position = np.nonzero(per_row(texts.response))
        identities = [(study_trial.PART, int(r), int(p)) for r, p in zip(row, position, strict=True)]
        expected = oracle.kept_tokens(dict(zip(identities, score.tolist(), strict=True)), 0.3, scope)
        kept = zip(*np.nonzero(per_row(keep)), strict=True)
        assert {(study_trial.PART, int(r), int(p)) for r, p in kept} == expected


def test_auroc_counts_pairs():
    generator = np.random.default_rng(1)
    score, positive = generator.integers(0, 9, 80).astype(float), generator.random(80) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in score[positive] for n in score[~positive]]
    assert study_trial.auroc(score, positive) == pytest.approx(np.mean(pairs))


def test_the_gate_passes_its_share_of_clean_tokens():
    texts = planted.World(0).texts(200)
    _, clean = known_of(texts)
    for gate_on, values in (("loss", clean["loss"]), ("rank", clean["rank"])):
        auto = Select(scorer="gated_excess_loss", gate="auto", gate_on=gate_on, gate_quantile=0.9)
        gate = study_trial.with_gate(auto, clean, texts.response).gate
        assert (values[texts.response] < gate).mean() == pytest.approx(0.9, abs=1e-3)


def test_each_round_starts_from_the_newest_model_and_is_scored_by_it(monkeypatch):
    trial = study_trial.Trial(study.made_up_task(replace(TINY, facts=0.0), 0), 0.6, 0)
    trial.run(Plan(Select(scorer="excess_loss")))  # what is known of the pool beforehand
    train, statistics = trial._train, study_trial.statistics
    starts, made, scored = [], [], []

    def spy(way, start, *others):
        starts.append(start)
        made.append(train(way, start, *others))
        return made[-1]

    monkeypatch.setattr(trial, "_train", spy)
    monkeypatch.setattr(
        study_trial, "statistics", lambda model, texts: scored.append((model, texts)) or statistics(model, texts)
    )
    trial.run(Plan(Select(scorer="excess_loss"), rounds=True))
    newest = [trial.task.reference, *(model for model, _ in made)]
    assert len(made) == ROUNDS
    assert all(one is other for one, other in zip(starts, newest, strict=False))
    task = trial.task
    judged = [model for model, texts in scored if texts is task.guard]
    assert all(one is other for one, other in zip(judged, newest[1:], strict=True))
    of_rounds = [model for model, texts in scored if not any(texts is of for of in (task.guard, *task.tests.values()))]
    assert all(one is other for one, other in zip(of_rounds, newest[:-1], strict=True))


def test_a_refused_round_does_not_become_the_reference(monkeypatch):
    monkeypatch.setattr(study, "ROUND", study.ROUND.model_copy(update={"learning_rate": 0.5}))  # wrecks the model
    trial = study_trial.Trial(study.made_up_task(replace(TINY, facts=0.0), 0), 0.6, 0)
    guarded = trial.run(Plan(Select(scorer="excess_loss"), rounds=True, guarded=True))
    assert [r["accepted"] for r in guarded["rounds"]] == [False] * REFUSALS
    assert guarded["accepted"] == 0
    assert guarded["loss"] == trial.measure(trial.task.reference)["loss"]
    free = trial.run(Plan(Select(scorer="excess_loss"), rounds=True))
    assert free["accepted"] == ROUNDS
    assert free["loss"] > guarded["loss"]


def test_the_measure_is_what_a_loop_over_the_answers_finds(trial):
    tests = trial.task.tests
    some = tests["loss"].answer & (tests["loss"].row < 3)  # which will be right, and most of the others wrong
    recipe = study.POOL.model_copy(update={"epochs": 30})
    model = study_trial.trained(trial.task.base, tests["loss"], some, recipe, 0)
    losses, right = {name: [] for name in tests}, {name: [] for name in tests}
    for name, texts in tests.items():
        for begin, end in itertools.pairwise(texts.offsets):
            logits = model.model(input_ids=torch.tensor(texts.ids[None, begin:end])).logits[0].detach().double()
            answer = [t for t in range(end - begin) if texts.answer[begin + t]]
            token = {t: texts.ids[begin + t] for t in answer}
            losses[name] += [-logits[t - 1].log_softmax(-1)[token[t]].item() for t in answer]
            right[name].append([logits[t - 1].argmax().item() == token[t] for t in answer])
    found = trial.measure(model)
    assert found == {
        "loss": pytest.approx(np.mean(losses["loss"]), abs=1e-4),
        "accuracy": np.mean(right["loss"]),
        "exact_match": np.mean([all(row) for row in right["loss"]]),
        "facts_loss": pytest.approx(np.mean(losses["facts_loss"]), abs=1e-4),
    }
    assert 0 < found["exact_match"] <= found["accuracy"] < 1


def test_a_selection_is_described_by_its_shares(trial):
    """One row of a prompt's token and seven of the response, of which two are noise and four the answer."""
    flags = {"response": "01111111", "answer": "00111100", "noise": "00001010", "fact": "11111111", "keep": "01101001"}
    flat = {name: np.array([flag == "1" for flag in row]) for name, row in flags.items()}
    keep = flat.pop("keep")
    texts = planted.Texts(ids=np.arange(8), offsets=np.array([0, 8]), **flat)
    found = trial.describe(texts, np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 6.0]), keep)
    assert found == {
        "kept": 4 / 7,
        "noise_kept": 1 / 4,
        "facts_kept": 1 / 3,  # the answer's noise is no fact
        "auroc": pytest.approx(9 / 10),  # of 5 · 2 pairs only the clean token of score 1 lies below a noisy one
    }


def what_95_percent_stay_within(model, texts):
    losses = np.sort(study_trial.statistics(model, texts)["loss"][texts.response])
    return pytest.approx(losses[int(0.95 * len(losses)) - 1], rel=1e-6)


def test_an_automatic_gate_is_of_clean_rows(trial):
    expected = what_95_percent_stay_within(trial.task.reference, trial.task.guard)
    assert trial.run(PLANS["fixed, auto gate"])["gate"] == expected


def test_the_gate_of_each_round_is_of_clean_rows_under_its_reference(trial, monkeypatch):
    train, select_tokens = trial._train, study_trial.select_tokens
    starts, gates = [], []
    monkeypatch.setattr(trial, "_train", lambda way, start, *others: starts.append(start) or train(way, start, *others))
    monkeypatch.setattr(
        study_trial, "select_tokens", lambda *given: gates.append(given[-1].gate) or select_tokens(*given)
    )
    trial.run(PLANS["self-evolving, auto gate"])
    assert len(gates) == ROUNDS
    assert gates == [what_95_percent_stay_within(start, trial.task.guard) for start in starts]


def test_an_automatic_ratio_keeps_the_noise_within_its_limit(trial):
    """A pool of one row many times over, which a reference soon knows, with a tenth of its tokens replaced."""
    clean = planted.World(0).texts(1).take([0] * 200)
    random = np.random.default_rng(0)
    replaced = clean.response & (random.random(len(clean.ids)) < 0.1)
    ids = np.where(replaced, random.choice(planted.LETTERS, len(replaced)), clean.ids)
    pool = replace(clean, ids=ids, noise=ids != clean.ids)
    recipe = study.POOL.model_copy(update={"epochs": 3})
    reference = study_trial.trained(trial.task.base, pool, pool.response & ~pool.noise, recipe, 0)
    few = clean.take(range(4))
    task = study_trial.Task(trial.task.base, reference, pool, few, {"loss": few}, trial.task.recipes)
    found = study_trial.Trial(task, 0.6, 0).run(PLANS["fixed, gate, auto ratio"])
    true = pool.noise.sum() / pool.response.sum()
    assert found["true_noise_share"] == true
    assert true < found["noise_share"] < 2 * true
    assert 0.8 < found["ratio"] == pytest.approx(found["kept"], abs=1e-3)
    assert found["noise_kept"] < Select().max_noise


@pytest.mark.parametrize(("learning_rate", "better"), [(5e-4, True), (0.5, False)])
def test_each_round_is_compared_to_the_best_so_far(trial, monkeypatch, learning_rate, better):
    recipe = study.ROUND.model_copy(update={"learning_rate": learning_rate})
    task = replace(trial.task, recipes=replace(trial.task.recipes, round=recipe))
    trial, row_sums, seen = study_trial.Trial(task, 0.6, 0), study_trial.row_sums, []
    monkeypatch.setattr(study_trial, "row_sums", lambda *given: seen.append(given) or row_sums(*given))
    trial.run(PLANS["self-evolving"])
    means = [trial.guard_known["loss"][task.guard.response].mean()]
    assert len(seen) == ROUNDS
    for mask, loss, best, _ in seen:
        assert best[mask].mean() == min(means)
        means.append(loss[mask].mean())
    assert (means[-1] < means[0]) == better
