"""Rounds: the plan, the guard, the planted task of the method's figures, resume, what is published."""

import json
import random
from pathlib import Path

import pytest
from conftest import write_rows
from test_report import open_page
from test_rounds import some_rows

from tokenclean_ray import demo, rounds
from tokenclean_ray.config import Select
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError
from tokenclean_ray.finished import open_finished
from tokenclean_ray.layout import TRAINED, Store
from tokenclean_ray.loop import plan_rounds
from tokenclean_ray.models import describe
from tokenclean_ray.report import write_report
from tokenclean_ray.report_data import gather


def values_for(tmp_path, base, **sections):
    values = {
        "output": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "pool.jsonl"), "warmup": str(tmp_path / "warm.jsonl")},
        "model": {"base": base},
        "train": {"method": "full", "learning_rate": 2e-3, "batch_rows": 48, "activation_checkpointing": False},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return values


def plans(evolve, **data):
    values = values_for(Path("x"), "base", evolve=evolve)
    values["data"] |= data
    return plan_rounds(build_config(values, "evolve"))


def test_self_evolving_takes_one_subset_a_round_and_the_newest_reference():
    found = plans({"num_subsets": 3})
    assert [(r.number, r.subsets, r.reference, r.start) for r in found] == [
        (1, (0,), "newest", "newest"),
        (2, (1,), "newest", "newest"),
        (3, (2,), "newest", "newest"),
    ]


def test_without_a_warmup_set_subset_0_is_the_warm_up():
    found = plans({"num_subsets": 3}, warmup=None)
    assert [r.subsets for r in found] == [(1,), (2,)]
    with pytest.raises(UserError, match="at least 2"):
        plans({"num_subsets": 1}, warmup=None)


def test_the_other_plans_are_one_round_from_the_base_over_the_whole_pool():
    found = plans({"num_subsets": 2, "plans": ["full", "random", "rho", "fixed"]})
    assert {r.subsets for r in found} == {(0, 1)}
    assert {r.start for r in found} == {"base"}
    described = [(r.plan, r.select.scorer, r.select.scope, r.select.keep_ratio, r.reference) for r in found]
    assert described == [
        ("full", "random", "global", 1.0, "none"),
        ("random", "random", "global", 0.6, "none"),
        ("rho", "gated_excess_loss", "sample", 0.6, "first"),
        ("fixed", "gated_excess_loss", "global", 0.6, "first"),
    ]


def test_the_random_plan_does_not_depend_on_the_gate():
    values = values_for(Path("x"), "base", evolve={"plans": ["random"]}, select={"gate": 3.0, "keep_ratio": 0.4})
    (found,) = plan_rounds(build_config(values, "evolve"))
    assert found.select == Select(scorer="random", seed=build_config(values, "evolve").seed, keep_ratio=0.4)


def planted_task(folder):
    """The demo's task: a base that knows the phrases only, a clean warm-up set, a pool with 30 % noise."""
    rng = random.Random(0)
    words = sorted({word for phrase in demo.OPENERS + demo.CLOSERS for word in phrase.split()})
    vocabulary = [*demo.SPECIALS, *demo.LETTERS, *words]
    tokenizer, base = demo._tokenizer(vocabulary), demo._model(len(vocabulary))
    loose = [demo._row(rng, lambda letters: [rng.choice(demo.LETTERS) for _ in letters]) for _ in range(5000)]
    demo._train(base, tokenizer, loose, whole_text=True, epochs=1)
    demo._save(base, tokenizer, folder / "base")
    write_rows(folder / "warm.jsonl", [demo._row(rng, demo._shift) for _ in range(500)])
    pool = [demo._plant(rng, demo._row(rng, demo._shift), demo.LETTERS + words) for _ in range(900)]
    write_rows(folder / "pool.jsonl", pool)
    write_rows(folder / "held.jsonl", [demo._row(rng, demo._shift) for _ in range(100)])
    return str(folder / "base")


@pytest.fixture(scope="module")
def evolved(tmp_path_factory, ray_session):
    """A guarded run on the planted task, with a baseline beside it."""
    folder = tmp_path_factory.mktemp("planted")
    base = planted_task(folder)
    values = values_for(
        folder,
        base,
        data={"held_out": str(folder / "held.jsonl"), "extra_columns": ["planted"]},
        evolve={"num_subsets": 2, "plans": ["random", "self_evolving"]},
        train={"epochs": 3, "tensorboard": True},
    )
    config = build_config(values, "evolve")
    return config, rounds.evolve(config)


@pytest.mark.train
def test_the_guarded_run_does_not_end_worse_than_its_best_round(evolved):
    _, record = evolved
    mine = [r for r in record["rounds"] if r["plan"] == "self_evolving"]
    assert mine
    accepted = [r for r in mine if r["accepted"]]
    best = min((r["held_out"]["loss"] for r in accepted), default=None)
    for outcome in mine:
        held = outcome["held_out"]
        assert outcome["accepted"] == (held["difference"] <= held["difference_error"])
    if accepted:
        last = accepted[-1]["held_out"]
        assert last["loss"] - best <= last["difference_error"]
        assert record["result_model"] == accepted[-1]["model"]
    else:
        assert record["result_model"].endswith(record["models"]["reference"]["path"].rsplit("/", 1)[-1])


@pytest.mark.train
def test_the_comparison_has_a_line_for_each_plan(evolved):
    config, record = evolved
    assert [row["plan"] for row in record["comparison"]] == ["random", "self_evolving"]
    assert Store(config.output).read_json("comparison.json") == record["comparison"]
    for row in record["comparison"]:
        assert row["held_out_loss"] > 0
        assert row["standard_error"] > 0
        assert row["tokens_trained"] > 0
        assert abs(row["kept_share"] - 0.6) < 0.001


@pytest.mark.train
def test_metrics_of_every_round(evolved):
    config, record = evolved
    lines = [json.loads(line) for line in Path(config.output, "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(record["rounds"])
    for line in lines:
        assert len(line["training_curve"]) > 2
        assert line["tokens_per_s"] > 0
        if line["plan"] == "self_evolving":
            assert 0 < line["agreement"] <= 1
    curves = list(Path(config.output, "tensorboard").rglob("events.*"))
    assert len(curves) == len(lines) + 1  # the reference's too


@pytest.mark.train
def test_one_masked_dataset_with_the_round_of_each_row(evolved):
    config, record = evolved
    store = Store(config.output)
    snapshot = f"masked/{record['result']['snapshot']}"
    rows = [r for part in store.part_names(snapshot) for r in store.read_part(snapshot, part).to_pylist()]
    counts = record["counts"]
    assert len(rows) == counts["masked"]
    assert counts["rows"] == 900 == sum(counts[k] for k in ("masked", "nothing_kept", "rejected", "warmup"))
    assert {r["round"] for r in rows} == {r["round"] for r in record["rounds"] if r["plan"] == "self_evolving"}
    prompts = {}
    for row in rows:  # the letters are the prompt: duplicates stay in one subset
        prompts.setdefault(tuple(row["input_ids"][1:5]), set()).add(row["round"])
    assert max(map(len, prompts.values())) == 1


@pytest.mark.train
def test_the_report_shows_rounds_and_plans_side_by_side(evolved, browser):
    config, record = evolved
    path = write_report(config.output)
    finished = open_finished(config.output)
    data = gather(finished)
    store = Store(config.output)
    labels = [store.read_part(finished.snapshot, p, ["labels"])["labels"] for p in store.part_names(finished.snapshot)]
    kept = sum(label != -100 for column in labels for row in column.to_pylist() for label in row)
    assert data["counts"]["kept"] == kept
    assert [curve["round"] for curve in data["curves"]] == [f"{r['plan']} {r['round']}" for r in record["rounds"]]
    assert {example["round"] for example in data["examples"]} == {c.round for c in finished.selections}
    open_page(browser, path)
    shown = browser.find_element("id", "rounds-side-by-side").text
    for outcome in record["rounds"]:
        assert f"{outcome['held_out']['loss']:.4f} ± {outcome['held_out']['standard_error']:.4f}" in shown
    for row in record["comparison"]:
        assert f"{row['accepted']}/{row['rounds']}" in shown


@pytest.mark.train
def test_a_report_shows_the_curves_of_its_own_run_while_the_next_is_at_work(evolved):
    config, _ = evolved
    file = Path(config.output, "metrics.jsonl")
    content = file.read_text()
    curves = gather(open_finished(config.output))["curves"]
    assert [curve["points"][0]["loss"] for curve in curves] == [
        pytest.approx(json.loads(line)["training_curve"][0], abs=1e-3) for line in content.splitlines()
    ]
    try:
        for now in ('{"plan": "fixed", "round": 1, "training_curve": [9.0, 8.0]}\n', content[:-50]):
            file.write_text(now)
            assert gather(open_finished(config.output))["curves"] == curves
    finally:
        file.write_text(content)


@pytest.mark.train
def test_rounds_done_stay_done(evolved):
    config, record = evolved
    models = {p: p.stat().st_mtime_ns for p in Path(config.output, "models").rglob("*") if p.is_file()}
    again = rounds.evolve(config)
    assert again["comparison"] == record["comparison"]
    assert again["result"] == record["result"]
    assert {p: p.stat().st_mtime_ns for p in Path(config.output, "models").rglob("*") if p.is_file()} == models


@pytest.mark.train
def test_two_refusals_end_the_plan_and_the_reference_stays(evolved, tmp_path):
    """A learning rate that ruins every round; the third would not be run."""
    config, record = evolved
    values = config.model_dump(mode="json")
    values["output"] = str(tmp_path / "run")
    values["model"]["reference"] = record["models"]["reference"]["path"]
    values["evolve"] |= {"plans": ["self_evolving"], "num_subsets": 3}
    values["train"] |= {"learning_rate": 1.0, "epochs": 1}
    values["select"] |= {"calibrate": {"share": 0.2}, "strict": True}  # a ruined model rules out every held-out token
    ruined = rounds.evolve(build_config(values, "evolve"))
    assert [r["accepted"] for r in ruined["rounds"]] == [False, False]
    assert ruined["result_model"] == values["model"]["reference"]
    (plan,) = ruined["comparison"]
    first = next(r for r in record["rounds"] if r["plan"] == "self_evolving")  # judged against the same reference
    assert plan["held_out_loss"] == pytest.approx(first["held_out"]["best_loss"], abs=1e-6)
    assert 0 < plan["standard_error"] < plan["held_out_loss"] < ruined["rounds"][0]["held_out"]["loss"]
    assert ruined["counts"]["warmup"] > 0  # the third subset's rows were not used
    finished = open_finished(values["output"])
    assert all(chosen.threshold["calibration"]["planted"] > 0 for chosen in finished.selections)
    assert gather(finished)["calibration"] == finished.selections[-1].threshold["calibration"]


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_without_the_guard_each_round_s_model_is_the_next_reference_and_start(tmp_path, model_pair):
    write_rows(tmp_path / "pool.jsonl", some_rows(40))
    values = values_for(tmp_path, model_pair[0], evolve={"num_subsets": 2, "guard": False})
    del values["data"]["warmup"]
    values["model"]["reference"] = model_pair[1]
    record = rounds.evolve(build_config(values, "evolve"))
    first, second = record["rounds"]
    assert first["reference"] == model_pair[1]
    assert second["reference"] == first["model"] != model_pair[1]
    assert record["result_model"] == second["model"]
    starts = [json.loads((Path(r["model"]) / TRAINED).read_text())["start"] for r in (first, second)]
    assert starts == [describe(model_pair[1]).fingerprint, describe(first["model"]).fingerprint]


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_a_model_that_lost_a_file_is_trained_again_to_the_same_bits(tmp_path, model_pair, capsys):
    write_rows(tmp_path / "pool.jsonl", some_rows(30))
    write_rows(tmp_path / "warm.jsonl", some_rows(16, seed=1))
    config = build_config(values_for(tmp_path, model_pair[0]), "clean")
    first = rounds.clean(config)
    model = Path(first["models"]["reference"]["path"])
    files = {path: path.read_bytes() for path in model.iterdir() if path.name != TRAINED}
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).unlink()
        capsys.readouterr()
        assert rounds.clean(config)["result"] == first["result"]
        assert f"{model} has lost {name}: it is trained again" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in model.iterdir() if path.name != TRAINED} == files


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_clean_trains_its_reference_from_the_warm_up_set(tmp_path, model_pair):
    write_rows(tmp_path / "pool.jsonl", some_rows(30))
    write_rows(tmp_path / "warm.jsonl", some_rows(16, seed=1))
    record = rounds.clean(build_config(values_for(tmp_path, model_pair[0]), "clean"))
    assert "/models/reference-" in record["models"]["reference"]["path"]
    assert record["threshold"]["kept"] == record["threshold"]["k"]
    folders = record["threshold"]["losses"]
    assert folders["base"] != folders["reference"]
