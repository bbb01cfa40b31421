"""Two tiny local tasks through the real harness on a real Ray, against each row alone through the model."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from conftest import CORPUS, make_llama, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean_ray import cli, evaluate
from tokenclean_ray.config import UserError
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
    for name, rows in (("choices", choices), ("texts", texts)):
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
    for name, own in tasks.items():
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / f"{name}.jsonl")}}}
        text = yaml.safe_dump({"task": name, **shared, **data, **own})
        if name == "texts":
            text += "process_results: !function metric.process_results\n"
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "metric.py").write_text(F1)
    listed = [{"task": "choices", "shots": 0}, {"task": "texts", "shots": 0, "metric": "f1"}]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"include": "tasks", "tasks": listed}))
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
    assert [row["model"] for row in rows] == list(model_pair)
    for row in rows:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(row["model"]),
            AutoTokenizer.from_pretrained(row["model"]),
        )
        share = np.mean([right(model, tokenizer, choice) for choice in suite[1]])
        found = row["tasks"]["choices"]
        assert found["value"] == pytest.approx(100 * share)
        assert found["stderr"] == pytest.approx(100 * (share * (1 - share) / 19) ** 0.5)
        assert found["samples"] == 20
        values = [row["tasks"][name] for name in ("choices", "texts")]
        assert row["average"] == pytest.approx(np.mean([v["value"] for v in values]))
        assert row["stderr"] == pytest.approx(np.hypot(*(v["stderr"] for v in values)) / 2)
        assert f"{found['value']:.2f} ± {found['stderr']:.2f}" in text
    assert (out / "evaluation.md").read_text() == text
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_run_again_and_a_changed_task_is(suite, model_pair, measured, capfd):
    out, text = measured
    stamps = {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")}
    assert len(stamps) == 4
    assert evaluate.evaluate(list(model_pair), str(suite[0] / "suite.yaml"), str(out)) == text
    assert "all 4 results are there" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")} == stamps
    next(path for path in stamps if path.name.startswith("texts")).unlink()  # as if the run had died before it
    assert evaluate.evaluate(list(model_pair), str(suite[0] / "suite.yaml"), str(out)) == text
    again = {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")}
    assert sum(again[path] != stamps[path] for path in stamps) == 1


def test_a_task_that_fails_leaves_the_others(suite, model_pair, tmp_path, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in (suite[0] / "tasks").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "metric.py").write_text("def process_results(doc, results):\n    return {}[0]\n")
    (tmp_path / "suite.yaml").write_bytes((suite[0] / "suite.yaml").read_bytes())
    out = tmp_path / "out"
    arguments = ["evaluate", model_pair[0], "--suite", str(tmp_path / "suite.yaml"), "--out", str(out)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "tokenclean: error: texts of" in error
    assert "KeyError" in error
    assert "| failed |" in (out / "evaluation.md").read_text()
    (row,) = Store(str(out)).read_json("evaluation.json")["models"]
    assert row["tasks"]["choices"]["samples"] == 20
    assert "average" not in row


def test_a_metric_that_the_task_has_not(suite):
    found = {"results": {"texts": {"f1,none": 0.5, "f1_stderr,none": 0.1}}, "n-samples": {"texts": {"effective": 3}}}
    with pytest.raises(UserError, match="task texts has no metric acc, but f1"):
        evaluate.result_of(found, evaluate.Task(task="texts", shots=0))


def test_a_group_counts_the_rows_of_its_tasks():
    counts = {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 5}}
    found = {"results": {"both": {"f1,none": 0.25, "f1_stderr,none": "N/A"}}, "n-samples": counts}
    assert evaluate.result_of(found, evaluate.Task(task="both", shots=1, metric="f1")) == evaluate.Result(25, None, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: []", "tasks"),
        ("tasks: [{task: a}]", "shots"),
        ("tasks: [{task: hellaswagg, shots: 0}]", "no task hellaswagg; did you mean hellaswag"),
        ("include: nowhere\ntasks: [{task: a, shots: 0}]", "include nowhere: no such folder"),
        ("[", "--suite"),
    ],
)
def test_suites_that_are_none(tmp_path, model_pair, content, message):
    (tmp_path / "suite.yaml").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        evaluate.evaluate([model_pair[0]], str(tmp_path / "suite.yaml"), str(tmp_path / "out"))
    assert message in str(caught.value)
    with pytest.raises(UserError, match=r"known by name: paper"):
        evaluate.load_suite("papper")


def test_the_paper_s_suite_is_what_the_harness_has():
    """Seven tasks with the paper's shots; TyDiQA is a group of ours."""
    suite = evaluate.load_suite("paper")
    shots = {task.task: task.shots for task in suite.tasks}
    assert shots == dict.fromkeys(("truthfulqa_mc2", "hellaswag", "arc_challenge", "boolq", "logiqa"), 0) | {
        "mmlu": 5,
        "tydiqa": 1,
    }
    manager = evaluate._tasks(suite.include)
    assert set(shots) <= set(manager.all_tasks)
    assert "tydiqa" in manager.all_groups


def test_the_paper_s_figures_stand_beside_a_model_of_the_same_shape(tmp_path, tokenizer):
    model = make_llama(0)
    path = save(tmp_path / "m", model, tokenizer)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert evaluate._known_base(evaluate.describe(path)) is None
    config |= {"hidden_size": 3072, "num_hidden_layers": 28, "vocab_size": 128256}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    base = evaluate._known_base(evaluate.describe(path))
    assert base == "LLaMA-3.2-3B"
    assert "| LLaMA-3.2-3B | 48.87 | 49.17 |" in evaluate._paper([{"base": base}, {"base": base}])
    assert evaluate._paper([{"base": None}]) == ""
