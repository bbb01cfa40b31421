"""The study on a task of a few rows, its figures against plain loops, and its files."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import oracle
import psutil
import pytest
from conftest import chat, make_llama, make_tokenizer, save, wait_for, write_rows

from tokenclean_ray import planted, study, study_text, study_trial
from tokenclean_ray.config import Select
from tokenclean_ray.errors import UserError
from tokenclean_ray.held_out import REFUSALS
from tokenclean_ray.study_plans import AUTO_PLANS, CORE_PLANS, PLANS, ROUNDS, SWEEP_PLANS, WIDE_PLANS, Plan

TINY = study.Setting(
    facts=0.4,
    pretrain_rows=64,
    warmup_rows=48,
    pool_rows=64,
    test_rows=16,
    plans=(*CORE_PLANS, "fixed, gate on rank 5", "fixed, gate, ratio 0.8", *AUTO_PLANS),
)


def per_row(texts, values):
    return values.reshape(-1, planted.LENGTH)


@pytest.mark.parametrize("kind", ["random", "other_rows"])
def test_planted_noise_is_what_differs_from_the_right_answer(kind):
    texts = planted.World(3).texts(400, noise=0.3, kind=kind, facts=0.5)
    clean = planted.World(3).texts(400, noise=0.0, facts=0.5)
    np.testing.assert_array_equal(texts.noise, texts.ids != clean.ids)
    assert 0.25 < per_row(texts, texts.noise)[:, 6:-1].mean() < 0.3
    assert not (texts.noise & ~texts.response).any()
    ids, fact = per_row(clean, clean.ids), per_row(clean, clean.fact)[:, 0]
    rule = ids[~fact]
    np.testing.assert_array_equal(rule[:, planted.ANSWER] - 3, (rule[:, 1:5] - 3 + 3) % 20)
    asked, answers = ids[fact][:, 1:5].ravel(), ids[fact][:, planted.ANSWER].ravel()
    assert len(set(zip(asked.tolist(), answers.tolist(), strict=True))) == len(set(asked.tolist()))


@pytest.mark.parametrize("kind", ["evasions", "wrong_answers"])
def test_noise_of_whole_answers(kind):
    texts = planted.World(3).texts(600, noise=0.3, kind=kind)
    noise, ids = per_row(texts, texts.noise), per_row(texts, texts.ids)
    assert 0.2 < noise.any(1).mean() < 0.4
    assert not np.delete(noise, np.r_[planted.ANSWER], 1).any()
    bad = ids[noise.any(1)][:, planted.ANSWER]
    shifts = (bad - ids[noise.any(1)][:, 1:5]) % 20
    if kind == "wrong_answers":
        assert noise[noise.any(1)][:, planted.ANSWER].all()
        assert (shifts == shifts[:, :1]).all()  # fluent: the whole answer by the same number
        assert set(shifts[:, 0]) == set(range(20)) - {planted.SHIFT}
    else:
        starts = {tuple(row) for row in ids[:, 6 : 6 + planted.ASKED].tolist()}  # of opening phrases
        assert {tuple(row) for row in bad.tolist()} <= starts


def known_of(texts, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {name: generator.exponential(2, len(texts.ids)).astype(np.float32) for name in study_trial.KNOWN}
        for _ in range(2)
    ]


def test_the_kept_tokens_are_the_oracles():
    texts = planted.World(0).texts(20, noise=0.3)
    known = study_trial.of_tokens(texts, *known_of(texts))
    for scope in ("global", "sample"):
        score, keep = study_trial.select_tokens(texts, known, Select(keep_ratio=0.3, scope=scope))
        row, position = np.nonzero(per_row(texts, texts.response))
        identities = [(study_trial.PART, int(r), int(p)) for r, p in zip(row, position, strict=True)]
        expected = oracle.kept_tokens(dict(zip(identities, score.tolist(), strict=True)), 0.3, scope)
        kept = zip(*np.nonzero(per_row(texts, keep)), strict=True)
        assert {(study_trial.PART, int(r), int(p)) for r, p in kept} == expected


def test_rows_that_are_taken_are_those_rows():
    texts = planted.World(0).texts(30, noise=0.3, facts=0.5)
    taken = texts.take([7, 3, 20])
    for number, row in enumerate((7, 3, 20)):
        for name in ("ids", "response", "answer", "noise", "fact"):
            one, other = per_row(texts, getattr(texts, name))[row], per_row(texts, getattr(taken, name))[number]
            np.testing.assert_array_equal(one, other)


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


def test_every_plan_runs_and_the_results_are_kept(tmp_path, capsys):
    study.run(str(tmp_path), [0], {"tiny": TINY}, workers=1)
    table = capsys.readouterr().out
    (line,) = (tmp_path / "trials.jsonl").read_text().splitlines()
    trial = json.loads(line)
    found = trial["plans"]
    assert set(found) == {"base", "reference", *TINY.plans}
    assert found["oracle"]["noise_kept"] == 0
    assert found["full"]["kept"] == found["full"]["facts_kept"] == 1
    assert found["fixed"]["kept"] == pytest.approx(0.6, abs=1e-3)
    assert found["fixed, gate, ratio 0.8"]["kept"] == pytest.approx(0.8, abs=1e-3)
    assert found["fixed, strict gate"]["kept"] < 0.6
    assert found["fixed, auto gate"]["gate"] > 0
    assert len(found["self-evolving"]["rounds"]) == ROUNDS
    assert (tmp_path / "study.md").read_text().strip() == table.strip()
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert all(f"| {plan} |" in table for plan in found)
    recovered = (found["full"]["loss"] - found["fixed"]["loss"]) / (found["full"]["loss"] - found["oracle"]["loss"])
    assert f"| {100 * recovered:.1f} % |" in table  # of one seed no spread is known

    half = line[: len(line) // 2]  # a process that died while it wrote
    (tmp_path / "trials.jsonl").write_text(f"{line}\n{half}")
    study.run(str(tmp_path), [0], {"tiny": TINY}, workers=1)
    assert (tmp_path / "trials.jsonl").read_text() == f"{line}\n{half}"
    changed = replace(TINY, keep_ratio=0.5, plans=("fixed",))
    study.run(str(tmp_path), [0], {"tiny": replace(changed, plans=("full", "fixed", "oracle"))}, workers=1)
    added = json.loads((tmp_path / "trials.jsonl").read_text().splitlines()[-1])
    assert added["plans"]["fixed"]["kept"] == pytest.approx(0.5, abs=1e-3)


def test_trials_of_other_versions_are_not_mixed_in(tmp_path):
    trial = {"seconds": 1.0, "plans": {name: {"loss": 0.5} for name in ("base", "reference", "full", "oracle")}}
    described = study._described(TINY)
    old = {"name": "tiny", "setting": described, "seed": 0, "versions": {"torch": "1.0"}} | trial
    study._append(tmp_path / "trials.jsonl", json.dumps(old))
    now = old | {"versions": study.VERSIONS, "seed": 1}
    study._append(tmp_path / "trials.jsonl", json.dumps(now))
    found = study._read_trials(tmp_path / "trials.jsonl")
    assert [study._identity(described, seed, study.VERSIONS) in found for seed in (0, 1)] == [False, True]


SLOW = """
import signal, sys, time
from tokenclean_ray import study
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
def run_trial(setting, seed):
    if seed:
        time.sleep(3600)
    return {"seconds": 1.0, "plans": {}}
if __name__ == "__main__":
    study.run_trial = run_trial
    study.run(sys.argv[1], range(9), {"tiny": study.Setting()}, workers=1)
"""


@pytest.mark.parametrize("stop", ["interrupt", "kill a trial"])
def test_a_study_that_is_stopped_leaves_at_once_and_keeps_what_is_done(tmp_path, stop):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "out")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: (tmp_path / "out" / "trials.jsonl").exists(), 60)
    if stop == "interrupt":
        os.killpg(running.pid, signal.SIGINT)
    else:
        (child,) = [p for p in psutil.Process(running.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        child.kill()
    error = running.communicate(timeout=30)[1]
    assert ("KeyboardInterrupt" if stop == "interrupt" else "the process of a trial died") in error
    assert len((tmp_path / "out" / "trials.jsonl").read_text().splitlines()) == 1


def test_the_plans_are_what_the_settings_name():
    lists = (CORE_PLANS, SWEEP_PLANS, WIDE_PLANS, AUTO_PLANS)
    assert {name for plans in lists for name in plans} == set(PLANS)
    assert all("full" in plans and "oracle" in plans for plans in lists)
    assert len({repr(plan) for plan in PLANS.values()}) == len(PLANS)  # no two names for one plan
    gated = {name for name, plan in PLANS.items() if plan.select.scorer == "gated_excess_loss"}
    assert gated == {name for name in PLANS if "gate" in name}


def test_what_models_are_judged_on_is_clean():
    task = study.made_up_task(replace(TINY, facts=0.4, noise=0.5), 0)
    assert task.pool.noise.any()
    assert not any(texts.noise.any() for texts in (task.guard, *task.tests.values()))


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


def rows_of(texts):
    return [texts.ids[begin:end].tobytes() for begin, end in itertools.pairwise(texts.offsets)]


def test_real_text(tmp_path):
    rows = [chat(f"the {n} quick", f"{n % 7} brown fox jumps over {n}") for n in range(60)]
    model = save(tmp_path / "model", make_llama(0), make_tokenizer())
    text = study_text.Text(write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[:20]), model,
                           guard_rows=8, test_rows=10)  # fmt: skip
    setting = study.Setting(text=text, pretrain_rows=8, warmup_rows=8, pool_rows=16, plans=("full", "fixed", "oracle"))
    study.run(str(tmp_path / "out"), [0], {"text": setting}, workers=1)
    trial = json.loads((tmp_path / "out" / "trials.jsonl").read_text())
    assert 0.2 < trial["plans"]["full"]["noise_kept"] < 0.4
    assert trial["plans"]["oracle"]["noise_kept"] == 0
    assert str(tmp_path) not in json.dumps(trial)  # files are named by what they hold
    _, parts = study_text.load(text, 8, 8, 16, 0)
    sizes = {name: len(texts.offsets) - 1 for name, texts in parts.items()}
    assert sizes == {"pretrain": 8, "warmup": 8, "guard": 8, "pool": 16, "test": 10}
    seen = [row for name, texts in parts.items() if name != "test" for row in rows_of(texts)]
    assert len(set(seen)) == len(seen)  # no row is trained on and judged by
    others = study_text.load(text, 8, 8, 16, 1)[1]
    assert rows_of(others["pool"]) != rows_of(parts["pool"])
    with pytest.raises(UserError, match="has 60 usable rows, the study wants"):
        study_text.load(text, 100, 8, 8, 0)
    unusable = write_rows(tmp_path / "c.jsonl", [{"text": "no row"}])
    with pytest.raises(UserError, match=r"c\.jsonl: no row can be encoded"):
        study_text.load(replace(text, data=unusable), 8, 8, 8, 0)
    with pytest.raises(UserError, match="made-up task"):
        study_text.plant_noise(study_text.load(text, 8, 8, 8, 0)[1]["pool"], 400, 0.3, "evasions", 0)
