"""The study on a task of a few rows, its figures against plain loops, and its files."""

import json
from dataclasses import asdict, replace

import numpy as np
import oracle
import pytest

from tokenclean_ray import planted, study
from tokenclean_ray.config import Select

TINY = study.Setting(facts=0.4, pretrain_rows=64, warmup_rows=48, pool_rows=64, test_rows=16)


def test_planted_noise_is_what_differs_from_the_right_answer():
    world = planted.World(3)
    texts = world.texts(400, noise=0.3, facts=0.5)
    clean = planted.World(3).texts(400, noise=0.0, facts=0.5)
    np.testing.assert_array_equal(texts.noise, texts.ids != clean.ids)
    assert 0.25 < texts.noise[:, 6:-1].mean() < 0.3
    assert not (texts.noise & ~texts.response).any()
    rule = clean.ids[~clean.fact]
    np.testing.assert_array_equal(rule[:, planted.ANSWER] - 3, (rule[:, 1:5] - 3 + 3) % 20)
    asked, answers = clean.ids[clean.fact][:, 1:5].ravel(), clean.ids[clean.fact][:, planted.ANSWER].ravel()
    assert len(set(zip(asked.tolist(), answers.tolist(), strict=True))) == len(set(asked.tolist()))


def test_the_kept_tokens_are_the_oracles():
    texts = planted.World(0).texts(20, noise=0.3)
    generator = np.random.default_rng(0)
    base, reference = generator.exponential(2, (2, 2, *texts.ids.shape)).astype(np.float32)
    for scope in ("global", "sample"):
        score, keep = study.select_tokens(texts, base, reference, Select(keep_ratio=0.3, scope=scope))
        row, position = np.nonzero(texts.response)
        identities = [(study.PART, int(r), int(p)) for r, p in zip(row, position, strict=True)]
        expected = oracle.kept_tokens(dict(zip(identities, score.tolist(), strict=True)), 0.3, scope)
        assert {(study.PART, int(r), int(p)) for r, p in zip(*np.nonzero(keep), strict=True)} == expected


def test_auroc_counts_pairs():
    generator = np.random.default_rng(1)
    score, positive = generator.integers(0, 9, 80).astype(float), generator.random(80) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in score[positive] for n in score[~positive]]
    assert study.auroc(score, positive) == pytest.approx(np.mean(pairs))


def test_every_plan_runs_and_the_results_are_kept(tmp_path, capsys):
    study.run(str(tmp_path), [0], {"tiny": TINY}, workers=1)
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "tiny-0.json").read_text())
    assert record["setting"] == asdict(TINY)
    found = record["plans"]
    assert set(found) == {
        *("base", "reference", "full", "random", "oracle", "rho", "fixed", "rho, gate", "fixed, gate"),
        *("self-evolving", "self-evolving, guarded", "self-evolving, gate", "self-evolving, guarded, gate"),
        *("fixed, gate, surprise", "fixed, gate, strict"),
    }
    assert found["oracle"]["noise_kept"] == 0
    assert found["full"]["kept"] == found["full"]["facts_kept"] == 1
    assert found["fixed"]["kept"] == pytest.approx(0.6, abs=1e-3)
    assert len(found["self-evolving"]["rounds"]) == study.ROUNDS
    assert (tmp_path / "study.md").read_text().strip() == table.strip()
    assert all(f"| {plan} |" in table for plan in found)
    stamp = (tmp_path / "tiny-0.json").stat().st_mtime_ns
    study.run(str(tmp_path), [0], {"tiny": TINY}, workers=1)
    assert (tmp_path / "tiny-0.json").stat().st_mtime_ns == stamp
    changed = replace(TINY, gate=3.0)
    study.run(str(tmp_path), [0], {"tiny": changed}, workers=1)
    assert json.loads((tmp_path / "tiny-0.json").read_text())["setting"]["gate"] == 3.0


def test_a_refused_round_does_not_become_the_reference(monkeypatch):
    monkeypatch.setattr(study, "ROUND", study.ROUND.model_copy(update={"learning_rate": 0.5}))  # wrecks the model
    trial = study.Trial(replace(TINY, facts=0.0), 0)
    guarded = trial.evolve(Select(), guarded=True)
    assert [r["accepted"] for r in guarded["rounds"]] == [False] * study.REFUSALS
    assert guarded["accepted"] == 0
    assert guarded["loss"] == trial.measure(trial.reference)["loss"]
    free = trial.evolve(Select(), guarded=False)
    assert free["accepted"] == study.ROUNDS
    assert free["loss"] > guarded["loss"]
