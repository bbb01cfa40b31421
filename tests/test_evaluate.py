"""Two tiny local tasks through the real harness on a real Ray, against each row alone through the model."""

import importlib.metadata
import json
import os
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import vl_convert
import yaml
from conftest import CORPUS, run_python
from test_suites import of_shape
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean_ray import cli, evaluate
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store

WORDS = CORPUS[0].split()
F1 = """
def process_results(doc, results):
    said, wanted = set(results[0].split()), set(doc["answer"].split())
    both = len(said & wanted)
    return {"f1": 2 * both / (len(said) + len(wanted))}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite's file, with a task of choices and a task of generated text whose metric is its own."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tasks").mkdir()
    rng = random.Random(0)
    choices = [
        {"question": " ".join(rng.choices(WORDS, k=6)), "choices": rng.sample(WORDS, 3), "answer": rng.randrange(3)}
        for _ in range(20)
    ]
    texts = [{"question": " ".join(rng.choices(WORDS, k=6)), "answer": rng.choice(WORDS)} for _ in range(6)]
    for name, rows in (("choices", choices), ("texts", texts), ("broken", texts)):
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "texts": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "f1", **mean}],
        },
    }
    tasks["broken"] = tasks["texts"]
    for name, own in tasks.items():
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / f"{name}.jsonl")}}}
        text = yaml.safe_dump({"task": name, **shared, **data, **own})
        if name != "choices":
            text += f"process_results: !function {name}.process_results\n"
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "texts.py").write_text(F1)
    (folder / "tasks" / "broken.py").write_text("def process_results(doc, results):\n    return {}[0]\n")
    listed = [{"task": "choices", "shots": 0}, {"task": "choices", "shots": 3}]
    listed.append({"task": "texts", "shots": 0, "metric": "f1"})
    (folder / "suite.yaml").write_text(yaml.safe_dump({"include": "tasks", "tasks": listed}))
    listed[-1] = listed[-1] | {"task": "broken"}
    (folder / "broken.yaml").write_text(yaml.safe_dump({"include": "tasks", "tasks": listed}))
    return folder, choices


def right(model, tokenizer, row):
    """Whether the choice that the model finds likeliest is the right one, each choice alone."""
    found = []
    for choice in row["choices"]:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
        with torch.no_grad():
            losses = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].double(), -1)
        found.append(sum(losses[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))))
    return int(np.argmax(found)) == row["answer"]


@pytest.fixture(scope="module")
def measured(suite, model_pair, tmp_path_factory, ray_session):
    out = tmp_path_factory.mktemp("evaluation")
    return out, evaluate.evaluate(list(model_pair), str(suite[0] / "suite.yaml"), str(out))


def test_every_model_on_every_task(suite, model_pair, measured):
    out, text = measured
    rows = Store(str(out)).read_json("evaluation.json")["models"]
    assert [row["path"] for row in rows] == list(model_pair)
    for row in rows:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(row["path"]), AutoTokenizer.from_pretrained(row["path"])
        share = np.mean([right(model, tokenizer, choice) for choice in suite[1]])
        found = row["tasks"]["choices, 0-shot acc"]
        assert found["value"] == pytest.approx(100 * share)
        assert found["stderr"] == pytest.approx(100 * (share * (1 - share) / 19) ** 0.5)
        assert found["samples"] == 20
        shots = row["tasks"]["choices, 3-shot acc"]
        assert shots != found  # the same task, and another prompt
        values = [found, shots, row["tasks"]["texts, 0-shot f1"]]
        assert row["average"]["value"] == pytest.approx(np.mean([v["value"] for v in values]))
        assert row["average"]["stderr"] == pytest.approx(np.sqrt(sum(v["stderr"] ** 2 for v in values)) / 3)
        assert f"| {row['model']} | {found['value']:.2f} ± {found['stderr']:.2f} | {shots['value']:.2f}" in text
    assert (out / "evaluation.md").read_text() == text
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")}


def test_what_is_there_is_not_run_again_and_a_changed_task_is(suite, model_pair, measured, capfd):
    out, text = measured
    file = str(suite[0] / "suite.yaml")
    before = stamps(out)
    assert len(before) == 6
    assert evaluate.evaluate(list(model_pair), file, str(out)) == text
    assert "all 6 results are there" in capfd.readouterr().err
    assert stamps(out) == before
    next(path for path in before if path.name.startswith("texts")).unlink()  # as if the run had died before it
    assert evaluate.evaluate(list(model_pair), file, str(out)) == text
    again = stamps(out)
    assert sum(again[path] != before[path] for path in before) == 1
    metric = suite[0] / "tasks" / "_shared"  # a file without a suffix counts, too
    metric.write_text("changed")
    limited = evaluate.evaluate([model_pair[0]], file, str(out), limit=4)
    assert "the first 4 rows of each task alone" in limited
    (row,) = Store(str(out)).read_json("evaluation.json")["models"]
    assert {figures["samples"] for figures in row["tasks"].values()} == {4}
    assert len(stamps(out)) == 9
    metric.unlink()


def test_a_task_that_fails_leaves_the_others(suite, model_pair, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", model_pair[0], "--suite", str(suite[0] / "broken.yaml"), "--out", str(out)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "tokenclean: error: broken of" in error
    assert "KeyError" in error
    assert "| failed |" in (out / "evaluation.md").read_text()
    (row,) = Store(str(out)).read_json("evaluation.json")["models"]
    assert row["tasks"]["choices, 0-shot acc"]["samples"] == 20
    assert row["average"] is None


def test_a_metric_that_the_task_has_not_is_said_beside_the_others(suite, measured, model_pair):
    out, _ = measured
    listed = yaml.safe_load((suite[0] / "suite.yaml").read_text())
    listed["tasks"][0]["metric"] = "accc"
    (suite[0] / "accc.yaml").write_text(yaml.safe_dump(listed))
    with pytest.raises(UserError, match="task choices has no metric accc, but acc"):
        evaluate.evaluate([model_pair[0]], str(suite[0] / "accc.yaml"), str(out))
    (row,) = Store(str(out)).read_json("evaluation.json")["models"]
    assert [found is None for found in row["tasks"].values()] == [True, False, False]


def test_of_several_filters_one_is_named_and_what_is_no_share_is_refused():
    figures = {"exact_match,strict-match": 0.02, "exact_match,flexible-extract": 0.31, "bleu,none": 27.5}
    result = {"figures": figures | {"exact_match_stderr,flexible-extract": 0.01}, "samples": 9}

    def found(metric):
        return evaluate.figures_of(result, evaluate.Task(task="gsm8k", shots=5, metric=metric))

    assert found("exact_match,flexible-extract") == {"value": 31, "stderr": 1, "samples": 9}
    with pytest.raises(UserError, match="name one, exact_match,strict-match or exact_match,flexible-extract"):
        found("exact_match")
    with pytest.raises(UserError, match=r"bleu is 27.5, no share of 1"):
        found("bleu")


def test_a_tokenizer_of_any_kind_decides_a_result(tmp_path):
    spec = evaluate.ModelSpec(str(tmp_path), None, "x" * 16, 1, 1, None)
    found = {evaluate._tokenizer_files(spec)}
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
        found.add(evaluate._tokenizer_files(spec))
    for commit in ("a" * 40, "b" * 40):  # of the hub, where the weights may be the same
        spec = evaluate.ModelSpec("owner/name", None, "x" * 16, 1, 1, None, revision=commit)
        found.add(evaluate._tokenizer_files(spec))
    assert len(found) == 7


def test_a_model_larger_than_any_node_is_not_waited_for(suite, model_pair, tmp_path, monkeypatch, ray_session):
    describe = evaluate.describe
    monkeypatch.setattr(evaluate, "describe", lambda model: replace(describe(model), bytes=1 << 40))
    (suite[0] / "one.yaml").write_text(yaml.safe_dump({"include": "tasks", "tasks": [{"task": "choices", "shots": 0}]}))
    assert "choices" in evaluate.evaluate([model_pair[0]], str(suite[0] / "one.yaml"), str(tmp_path / "out"), limit=2)


def test_a_metric_that_the_task_has_not():
    result = {"figures": {"f1,none": 0.5, "f1_stderr,none": 0.1}, "samples": 3}
    assert evaluate.figures_of(result, evaluate.Task(task="texts", shots=0, metric="f1"))["value"] == 50
    with pytest.raises(UserError, match="task texts has no metric acc, but f1"):
        evaluate.figures_of(result, evaluate.Task(task="texts", shots=0))


def test_a_group_counts_the_rows_of_its_tasks_and_keeps_its_shots():
    counts = {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 5}}
    figures = {"f1,none": 0.25, "f1_stderr,none": "N/A"}
    found = {"results": {"both": figures | {"alias": "both"}}, "n-samples": counts, "n-shot": {"a": 1, "b": 1}}
    task = evaluate.Task(task="both", shots=1, metric="f1")
    result = evaluate.result_of(found, task)
    assert result == {"figures": figures, "samples": 9}
    assert evaluate.figures_of(result, task) == {"value": 25, "stderr": None, "samples": 9}
    with pytest.raises(UserError, match="fixes its shots at 0, 1, not 1"):
        evaluate.result_of(found | {"n-shot": {"a": 1, "b": 0}}, task)
    with pytest.raises(UserError, match="has no figures"):
        evaluate.result_of(found | {"results": {}}, task)


def test_gpus_that_there_are_and_that_are_still_to_come(monkeypatch, capfd):
    nodes = [{"Alive": alive, "Resources": {"GPU": gpus}} for alive, gpus in ((True, 4.0), (True, 4.0), (False, 8.0))]
    monkeypatch.setattr(evaluate.ray, "nodes", lambda: nodes)
    assert (evaluate._gpus(2), evaluate._gpus(None)) == (2, 1)
    with pytest.raises(UserError, match="--gpus is 8, but no node has more than 4"):
        evaluate._gpus(8)
    monkeypatch.setattr(evaluate.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    assert evaluate._gpus(None) == 0
    assert capfd.readouterr().err == ""
    assert evaluate._gpus(8) == 8
    assert "no node has a GPU yet, and --gpus is 8: waiting for one" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: []", "tasks"),
        ("tasks: [{task: a}]", "shots"),
        ("include: PAPER\ntasks: [{task: hellaswagg, shots: 0}]", "no task hellaswagg; did you mean hellaswag"),
        ("include: PAPER\ntasks: [{task: ai2_arc, shots: 0}]", "ai2_arc is a tag"),
        ("include: nowhere\ntasks: [{task: a, shots: 0}]", "include nowhere: no such folder"),
        ("[", "--suite"),
    ],
)
def test_suites_that_are_none(tmp_path, model_pair, content, message):
    paper = str(evaluate.SUITES / "paper")  # as another test has it, since an index takes a quarter of a minute
    (tmp_path / "suite.yaml").write_text(content.replace("PAPER", paper))
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        evaluate.evaluate([model_pair[0]], str(tmp_path / "suite.yaml"), str(tmp_path / "out"))
    assert message in str(caught.value)
    with pytest.raises(UserError, match=r"known by name: paper"):
        evaluate.load_suite("papper")


@pytest.fixture
def asked(monkeypatch, ray_session):
    """The results that each evaluation asks for, by name; all are one half, and none is measured."""
    names = []

    def one_half(store, wanted, *others):
        names.append(set(wanted.values()))
        for (_, task), file in wanted.items():
            store.write_json(file, {"figures": {f"{task.metric},none": 0.5}, "samples": 2})
        return []

    monkeypatch.setattr(evaluate, "_run_missing", one_half)
    monkeypatch.setattr(evaluate, "_check_tasks", lambda suite: None)  # an index takes a quarter of a minute
    return names


def test_the_paper_s_figures_stand_beside_its_own_suite_alone(asked, tmp_path, tokenizer):
    model = of_shape(tmp_path / "m", tokenizer, "llama", 3072, 28, 128256)
    (tmp_path / "own.yaml").write_text("tasks: [{task: mmlu, shots: 5}]")
    texts = [
        evaluate.evaluate([model], suite, str(tmp_path / "out")) for suite in ("paper", str(tmp_path / "own.yaml"))
    ]
    assert ["| LLaMA-3.2-3B | 48.87 |" in text for text in texts] == [True, False]


def test_what_decides_a_result_is_in_its_name(asked, tmp_path, model_pair, monkeypatch):
    model = shutil.copytree(model_pair[0], tmp_path / "model")
    (tmp_path / "suite.yaml").write_text("tasks: [{task: a, shots: 0}]")

    def evaluate_again():
        evaluate.evaluate([str(model)], str(tmp_path / "suite.yaml"), str(tmp_path / "out"))

    evaluate_again()
    evaluate_again()
    (model / "tokenizer_config.json").write_text("{}")
    evaluate_again()
    monkeypatch.setattr(evaluate, "_gpus", lambda wanted: 1)  # there the weights are bfloat16
    evaluate_again()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda of: "0.4.99" if of == "lm_eval" else version(of))
    evaluate_again()
    first, again, *others = asked
    assert first == again
    assert len(set().union(first, *others)) == 4


def test_the_figure_draws_two_standard_errors_to_either_side(monkeypatch):
    svg = vl_convert.vegalite_to_svg  # the same drawing, as text
    monkeypatch.setattr(evaluate.vl_convert, "vegalite_to_png", lambda chart, scale: svg(chart).encode())
    found = {"x": {"value": 40.0, "stderr": 2.5, "samples": 7}, "y": {"value": 61.0, "stderr": None, "samples": 7}}
    rows = [{"model": model, "tasks": {"a": figures}, "average": None} for model, figures in found.items()]
    labels = re.findall(r'<(?:line|path) aria-label="([^"]*)"', evaluate._figure(rows).decode())
    bars = [re.search(r"model: (\w);.*value \+ error: ([\d.]+); value - error: ([\d.]+)", label) for label in labels]
    dots = [re.fullmatch(r"percent.*: ([\d.]+); model: (\w)", label) for label in labels]
    assert [bar.groups() for bar in bars if bar] == [("x", "45", "35"), ("y", "61", "61")]
    assert [dot.groups() for dot in dots if dot] == [("40", "x"), ("61", "y")]


@pytest.mark.faults
def test_a_task_whose_worker_dies_is_run_again(tmp_path, monkeypatch, ray_session):
    died = tmp_path / "died"

    def dies_once(store, file, *others):
        if not died.exists():
            died.touch()
            os._exit(1)
        store.write_json(file, {"samples": 2})

    monkeypatch.setattr(evaluate, "_measure", dies_once)
    monkeypatch.setattr(evaluate, "_tasks", lambda include: None)
    store, task = Store(str(tmp_path / "out")), evaluate.Task(task="a", shots=0)
    spec = evaluate.ModelSpec(str(tmp_path), None, "x" * 16, 1, 1, None)
    assert evaluate._run_missing(store, {(spec, task): "a.json"}, evaluate.Suite(tasks=(task,)), None, "8", 0) == []
    assert died.exists()
    assert store.read_json("a.json") == {"samples": 2}


PROCESSES = """
import os, sys, ray
from tokenclean_ray import evaluate
from tokenclean_ray.layout import Store
ray.init("local", num_cpus=1, num_gpus=1, logging_level="ERROR", log_to_driver=False)
evaluate._measure = lambda store, file, *others: store.write_json(file, os.getpid())
evaluate._tasks = lambda include: None
store, tasks = Store(sys.argv[1]), [evaluate.Task(task=name, shots=0) for name in "abc"]
spec = evaluate.ModelSpec(sys.argv[1], None, "x" * 16, 1, 1, None)
names = {(spec, task): f"{task.task}.json" for task in tasks}
assert evaluate._run_missing(store, names, evaluate.Suite(tasks=tasks), None, "8", 1) == []
print(len({store.read_json(file) for file in names.values()}))
"""


def test_a_task_on_a_gpu_has_a_process_of_its_own(tmp_path):
    """Memory that the one before has not freed, and a device that it made fail, end with its process."""
    assert run_python(PROCESSES, str(tmp_path), RAY_ADDRESS="") == "3\n"
