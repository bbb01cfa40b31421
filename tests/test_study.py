"""The study on a task of a few rows: its texts, settings and files; what a trial finds: test_study_trial."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from conftest import chat, make_llama, make_tokenizer, save, wait_for, write_rows

from tokenclean_ray import planted
from tokenclean_ray.errors import UserError
from tokenclean_ray.study import real_text, report
from tokenclean_ray.study import run as study
from tokenclean_ray.study import trial as study_trial
from tokenclean_ray.study.plans import AUTO_PLANS, CORE_PLANS, PLANS, ROUNDS, SWEEP_PLANS, WIDE_PLANS

TINY = study.Setting(
    facts=0.4,
    pretrain_rows=64,
    warmup_rows=48,
    pool_rows=64,
    test_rows=16,
    plans=(*CORE_PLANS, "fixed, gate on rank 5", "fixed, gate, ratio 0.8", *AUTO_PLANS),
)
SMALL = replace(TINY, pretrain_rows=16, warmup_rows=16, pool_rows=16, test_rows=8)


@pytest.fixture
def trainings(monkeypatch):
    """What is asked of `trained` while a task is made; nothing is trained."""
    asked = []
    monkeypatch.setattr(study, "trained", lambda *given: asked.append(given) or given[0])
    return asked


def per_row(values):
    return values.reshape(-1, planted.LENGTH)


@pytest.mark.parametrize("kind", ["random", "other_rows"])
def test_planted_noise_is_what_differs_from_the_right_answer(kind):
    texts = planted.World(3).texts(400, noise=0.3, kind=kind, facts=0.5)
    clean = planted.World(3).texts(400, noise=0.0, facts=0.5)
    np.testing.assert_array_equal(texts.noise, texts.ids != clean.ids)
    assert 0.25 < per_row(texts.noise)[:, 6:-1].mean() < 0.3
    assert not (texts.noise & ~texts.response).any()
    ids, fact = per_row(clean.ids), per_row(clean.fact)[:, 0]
    rule = ids[~fact]
    np.testing.assert_array_equal(rule[:, planted.ANSWER] - 3, (rule[:, 1:5] - 3 + 3) % 20)
    asked, answers = ids[fact][:, 1:5].ravel(), ids[fact][:, planted.ANSWER].ravel()
    assert len(set(zip(asked.tolist(), answers.tolist(), strict=True))) == len(set(asked.tolist()))


@pytest.mark.parametrize("kind", ["evasions", "wrong_answers"])
def test_noise_of_whole_answers(kind):
    texts = planted.World(3).texts(600, noise=0.3, kind=kind)
    noise, ids = per_row(texts.noise), per_row(texts.ids)
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


@pytest.mark.parametrize(("kind", "share"), [("random", 0), ("evasions", 0.2)])
def test_the_base_has_seen_evasions_where_the_task_is_about_them(trainings, kind, share):
    study.made_up_task(replace(SMALL, kind=kind, pretrain_rows=2000), 0)
    ids = per_row(trainings[0][1].ids)
    answers = ids[:, planted.ANSWER]
    evasive = np.isin(answers, planted.WORDS).all(1)  # else letters and what is asked
    assert evasive.mean() == pytest.approx(share, abs=0.03)
    assert set(map(tuple, answers[evasive])) <= set(map(tuple, ids[:, 6 : 6 + planted.ASKED]))  # of opening phrases


def test_the_base_repeats_half_of_what_is_asked():
    ids = planted.World(0).loose_texts(2000).ids.reshape(-1, planted.LENGTH)
    assert (ids[:, 1:5] == ids[:, planted.ANSWER]).mean() == pytest.approx(0.5, abs=0.03)


def test_rows_that_are_taken_are_those_rows():
    texts = planted.World(0).texts(30, noise=0.3, facts=0.5)
    taken = texts.take([7, 3, 20])
    for number, row in enumerate((7, 3, 20)):
        for name in ("ids", "response", "answer", "noise", "fact"):
            one, other = per_row(getattr(texts, name))[row], per_row(getattr(taken, name))[number]
            np.testing.assert_array_equal(one, other)


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


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_a_trial_follows_from_its_seed(monkeypatch):
    seeds, trained = [], study_trial.trained
    for module in (study, study_trial):
        monkeypatch.setattr(module, "trained", lambda *given: seeds.append(given[-1]) or trained(*given))
    one = replace(SMALL, plans=("full",))
    first, again, other = (study.run_trial(one, seed)["plans"] for seed in (5, 5, 6))
    assert seeds == [5] * 6 + [6] * 3  # of the base, the reference and the plan
    assert first == again
    assert first["base"] != other["base"]


@pytest.mark.usefixtures("_two_threads")
def test_a_trial_takes_one_thread():
    study.run_trial(replace(SMALL, plans=("oracle",)), 0)
    assert torch.get_num_threads() == 1


def test_another_seed_has_other_texts_and_starts_from_another_model(trainings):
    pools = [study.made_up_task(SMALL, seed).pool for seed in (0, 0, 1)]
    weights = [trainings[2 * number][0].model.lm_head.weight for number in range(3)]
    assert rows_of(pools[0]) == rows_of(pools[1]) != rows_of(pools[2])
    assert [torch.equal(weights[0], of) for of in weights] == [True, True, False]


def test_the_table_gives_mean_and_standard_deviation_over_seeds(tmp_path):
    losses = [{"full": 2.0, "fixed": 1.5, "oracle": 1.0}, {"full": 3.0, "fixed": 1.5, "oracle": 1.0}]
    trial = {"name": "tiny", "setting": study._described(TINY), "seconds": 1.0}
    trials = [trial | {"plans": {plan: {"loss": loss} for plan, loss in of.items()}} for of in losses]
    text = report.write(tmp_path, trials, trial["setting"])
    assert "2 seeds, mean ± standard deviation" in text
    assert "| full | 2.500 ± 0.707 |  |" in text
    assert "| fixed | 1.500 ± 0.000 | 62.5 ± 17.7 % |" in text  # 0.5 of 1 and 1.5 of 2


def test_a_plan_that_diverged_does_not_stop_the_figure(tmp_path):
    plans = {"full": {"loss": 2.0}, "fixed": {"loss": float("nan")}, "oracle": {"loss": 1.0}}
    trial = {"name": "tiny", "setting": study._described(TINY), "seconds": 1.0, "plans": plans}
    assert "| fixed | nan |" in report.write(tmp_path, [trial], trial["setting"])
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


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
from tokenclean_ray.study import run as study
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
    trials = tmp_path / "out" / "trials.jsonl"
    wait_for(lambda: trials.exists() and trials.read_text().endswith("\n"))  # it is there before its first line
    if stop == "interrupt":
        os.killpg(running.pid, signal.SIGINT)
    else:
        (child,) = [p for p in psutil.Process(running.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        child.kill()
    error = running.communicate(timeout=300)[1]
    assert ("KeyboardInterrupt" if stop == "interrupt" else "the process of a trial died") in error
    assert len(trials.read_text().splitlines()) == 1


def test_the_plans_are_what_the_settings_name():
    lists = (CORE_PLANS, SWEEP_PLANS, WIDE_PLANS, AUTO_PLANS)
    assert {name for plans in lists for name in plans} == set(PLANS)
    assert all("full" in plans and "oracle" in plans for plans in lists)
    assert len({repr(plan) for plan in PLANS.values()}) == len(PLANS)  # no two names for one plan
    gated = {name for name, plan in PLANS.items() if plan.select.scorer == "gated_excess_loss"}
    assert gated == {name for name in PLANS if "gate" in name}


def changed(setting):
    plain = asdict(study.Setting())
    return {name: value for name, value in asdict(setting).items() if value != plain[name] and name != "plans"}


def test_the_settings_are_what_their_names_say():
    assert {name: changed(setting) for name, setting in (study.CORE | study.SWEEP).items()} == {
        "rule": {},
        "facts": {"facts": 0.4},
        "noise 0.05": {"noise": 0.05},
        "noise 0.15": {"noise": 0.15},
        "noise 0.45": {"noise": 0.45},
        "other rows": {"kind": "other_rows"},
        "evasions": {"kind": "evasions"},
        "wrong answers": {"kind": "wrong_answers"},
        "noisy warm-up": {"warmup_noise": 0.3},
        "short warm-up": {"warmup_rows": 200},
        "facts, auto ratio, noise 0.1": {"facts": 0.4, "noise": 0.1},
        "facts, auto ratio, noise 0.3": {"facts": 0.4},
        "facts, auto ratio, noise 0.45": {"facts": 0.4, "noise": 0.45},
        "facts, gates and ratios": {"facts": 0.4},
        "facts, gates and ratios, noise 0.1": {"facts": 0.4, "noise": 0.1},
    }
    for name, setting in study.SWEEP.items():
        wide, auto = "gates and ratios" in name, "auto ratio" in name
        assert setting.plans == (WIDE_PLANS if wide else AUTO_PLANS if auto else SWEEP_PLANS)
    assert {setting.plans for setting in study.CORE.values()} == {CORE_PLANS}


def test_the_reference_is_the_base_after_a_warm_up_set_of_its_own_noise(trainings):
    task = study.made_up_task(replace(TINY, warmup_noise=0.3), 0)
    (_, _, everything, pretrain, _), (_, warmup, kept, recipe, _) = trainings
    assert everything.all()
    np.testing.assert_array_equal(kept, warmup.response)
    assert (pretrain, recipe) == (study.PRETRAIN, study.WARMUP)
    assert task.recipes == study_trial.Recipes(pool=study.POOL, round=study.ROUND)
    assert warmup.noise[warmup.response].mean() == pytest.approx(0.3, abs=0.05)
    assert task.pool.fact.any()
    assert not any(texts.fact.any() for texts in (warmup, task.guard))


def test_what_models_are_judged_on_is_clean():
    task = study.made_up_task(replace(TINY, facts=0.4, noise=0.5), 0)
    assert task.pool.noise.any()
    assert not any(texts.noise.any() for texts in (task.guard, *task.tests.values()))


def rows_of(texts):
    return [texts.ids[begin:end].tobytes() for begin, end in itertools.pairwise(texts.offsets)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = [chat(f"the {n} quick", f"{n % 7} brown fox jumps over {n}") for n in range(60)]
    model = save(folder / "model", make_llama(0), make_tokenizer())
    data, test = write_rows(folder / "a.jsonl", rows), write_rows(folder / "b.jsonl", rows[:20])
    return real_text.Text(data, test, model, guard_rows=8, test_rows=10)


def test_real_text(tmp_path, text):
    setting = study.Setting(text=text, pretrain_rows=8, warmup_rows=8, pool_rows=16, plans=("full", "fixed", "oracle"))
    study.run(str(tmp_path / "out"), [0], {"text": setting}, workers=1)
    trial = json.loads((tmp_path / "out" / "trials.jsonl").read_text())
    assert 0.2 < trial["plans"]["full"]["noise_kept"] < 0.4
    assert trial["plans"]["oracle"]["noise_kept"] == 0
    assert os.path.dirname(text.data) not in json.dumps(trial)  # files are named by what they hold
    _, parts = real_text.load(text, 8, 8, 16, 0)
    sizes = {name: len(texts.offsets) - 1 for name, texts in parts.items()}
    assert sizes == {"pretrain": 8, "warmup": 8, "guard": 8, "pool": 16, "test": 10}
    seen = [row for name, texts in parts.items() if name != "test" for row in rows_of(texts)]
    assert len(set(seen)) == len(seen)  # no row is trained on and judged by
    others = real_text.load(text, 8, 8, 16, 1)[1]
    assert rows_of(others["pool"]) != rows_of(parts["pool"])
    with pytest.raises(UserError, match="has 60 usable rows, the study wants"):
        real_text.load(text, 100, 8, 8, 0)
    unusable = write_rows(tmp_path / "c.jsonl", [{"text": "no row"}])
    with pytest.raises(UserError, match=r"c\.jsonl: no row can be encoded"):
        real_text.load(replace(text, data=unusable), 8, 8, 8, 0)
    with pytest.raises(UserError, match="made-up task"):
        real_text.plant_noise(real_text.load(text, 8, 8, 8, 0)[1]["pool"], 400, 0.3, "evasions", 0)


def test_what_models_of_real_text_are_trained_on_and_judged_by(text, trainings):
    text = replace(text, pretrain_epochs=4, warmup_epochs=3)
    task = study.text_task(study.Setting(text=text, pretrain_rows=8, warmup_rows=9, pool_rows=16), 3)
    _, parts = real_text.load(text, 8, 9, 16, 3)
    for (_, texts, keep, recipe, seed), name, epochs in zip(trainings, ("pretrain", "warmup"), (4, 3), strict=True):
        assert rows_of(texts) == rows_of(parts[name])
        np.testing.assert_array_equal(keep, texts.response)
        assert (recipe, seed) == (text.recipe(epochs), 3)
    assert rows_of(task.guard) == rows_of(parts["guard"])
    assert {name: rows_of(texts) for name, texts in task.tests.items()} == {"loss": rows_of(parts["test"])}
    assert task.pool.noise.any()
    np.testing.assert_array_equal(task.pool.ids != parts["pool"].ids, task.pool.noise)
