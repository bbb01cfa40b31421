"""The paper's suite: what the harness has of it, and the paper's own figures beside models of its bases' shapes."""

import json

import pytest
import yaml
from conftest import make_llama, save

from tokenclean_ray import evaluate


def test_the_paper_s_suite_is_what_the_harness_has():
    """Seven tasks with the paper's shots; TyDiQA is a group of ours."""
    suite = evaluate.load_suite("paper")
    shots = {task.task: task.shots for task in suite.tasks}
    assert shots == dict.fromkeys(("truthfulqa_mc2", "hellaswag", "arc_challenge", "boolq", "logiqa"), 0) | {
        "mmlu": 5,
        "tydiqa": 1,
    }
    manager = evaluate._tasks(suite.include)
    assert set(shots) <= set(manager.all_tasks) - set(manager.all_tags)
    group = yaml.safe_load((evaluate.SUITES / "paper" / "tydiqa.yaml").read_text())
    assert len(group["task"]) == 9
    assert set(group["task"]) <= set(manager.all_subtasks)


def test_logiqa_asks_what_the_harness_s_own_asks(tmp_path):
    """Its data alone lie elsewhere."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.logiqa import utils_logiqa

    row = {"context": "c", "question": "q?", "options": ["o", "p", "q", "r"], "label": "c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = yaml.safe_load((evaluate.SUITES / "paper" / "logiqa.yaml").read_text())
    local = {"path": "json", "name": None, "kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    config |= {f"dataset_{key}": value for key, value in local.items()} | {"training_split": None}
    manager = TaskManager(include_defaults=False)
    task = manager.load([config | {"validation_split": None}])["tasks"]["logiqa"]
    doc = next(iter(task.test_docs()))
    assert task.doc_to_text(doc) == utils_logiqa.doc_to_text(row)
    assert task.doc_to_target(doc) == utils_logiqa.doc_to_target(row)
    assert task.doc_to_choice(doc) == row["options"]


def of_shape(folder, tokenizer, kind, hidden, layers, vocabulary):
    """A tiny model whose config.json says that it is larger."""
    path = save(folder, make_llama(0), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        (("llama", 3072, 28, 128256), "| LLaMA-3.2-3B | 48.87 | 49.17 | 48.97 | 51.67 | 51.83 | 53.00 |"),
        (("llama", 4096, 32, 128256), "| LLaMA-3.1-8B | 55.93 | 56.10 | 56.47 | 58.20 | 58.77 | 59.33 |"),
        (("mistral", 4096, 32, 32768), "| Mistral-7B-v0.3 | 55.20 | 54.93 | 54.53 | 55.07 | 55.30 | 54.93 |"),
    ],
)
def test_the_paper_s_figures_stand_beside_a_model_of_the_same_shape(tmp_path, tokenizer, shape, line):
    base = evaluate._known_base(evaluate.describe(of_shape(tmp_path / "m", tokenizer, *shape)))
    lines = evaluate._paper([{"base": base}, {"base": None}, {"base": base}]).splitlines()
    assert lines[-3] == "| base | warm-up | full tokens | random 60 % | RHO | fixed | self-evolving |"
    assert lines[-1] == line


def test_the_paper_s_figures_do_not_stand_beside_another_model(model_pair):
    base = evaluate._known_base(evaluate.describe(model_pair[0]))
    assert base is None
    assert evaluate._paper([{"base": base}]) == ""
