"""A config for a file: it names the format, loads as it is written, and never replaces one."""

import json
import re
import shlex

import pytest
from conftest import chat, write_rows

from tokenclean_ray import cli
from tokenclean_ray.config_file import load_config
from tokenclean_ray.formats import to_messages
from tokenclean_ray.init import recognise
from tokenclean_ray.schema import RowError

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        (chat("q", "a"), "messages", {}),
        ({"conversations": TURNS}, "sharegpt", {}),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", {}),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", {}),
        ({"question": "q", "answer": "a"}, "question_answer", {}),
        ({"dialogue": TURNS, "n": 1}, "messages", {"messages": "dialogue"}),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "qa"},  # Dolly
            "alpaca",
            {"input": "context", "output": "response"},
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},  # OpenOrca
            "question_answer",
            {"system": "system_prompt", "question": "question", "answer": "response"},
        ),
        (
            {"rejected": TURNS, "prompt": "q", "chosen": TURNS},  # preferences: the bad answers are not cleaned
            "messages",
            {"messages": "chosen"},
        ),
        (
            {"prompt": TURNS[:1], "rejected": TURNS[1:], "chosen": TURNS[1:]},
            "prompt_completion",
            {"completion": "chosen"},
        ),
        ({"inputs": "q", "targets": "a"}, "question_answer", {"question": "inputs", "answer": "targets"}),  # Flan, Aya
        (
            {"problem": "q", "generated_solution": "a", "expected_answer": "3"},  # OpenMathInstruct 2
            "question_answer",
            {"question": "problem", "answer": "generated_solution"},
        ),
        ({"Query": "q", "response": "a"}, "question_answer", {"question": "Query", "answer": "response"}),
        (
            {"problem": "q", "solution": "a", "answer": "3"},  # NuminaMath 1.5: not the result alone
            "question_answer",
            {"question": "problem", "answer": "solution"},
        ),
        (
            {"input": [*TURNS, TURNS[0]], "output": "a", "system_prompt": "s"},  # Llama-Nemotron
            "prompt_completion",
            {"system": "system_prompt", "prompt": "input", "completion": "output"},
        ),
        (
            {"messages": TURNS[:1], "response": "a"},
            "prompt_completion",
            {"prompt": "messages", "completion": "response"},
        ),
        ({"dialogue": TURNS, "response": "a"}, "messages", {"messages": "dialogue"}),  # ends with an answer of its own
        (
            {"messages": [*TURNS, TURNS[0]], "output": "a"},  # whose answers are not those in the prompt
            "prompt_completion",
            {"prompt": "messages", "completion": "output"},
        ),
        (
            {"query": "q", "answers": '[{"name": "f", "arguments": {}}]', "tools": '[{"name": "f"}]'},  # xLAM
            "question_answer",
            {"question": "query", "answer": "answers"},
        ),
        ({"conversations": ["q", "a"], "source": "s"}, "sharegpt", {}),  # LIMA
        ({"data": ["q", "a"], "id": "0"}, "messages", {"messages": "data"}),  # UltraChat
        (
            {"tags": ["x", "y"], "query": "q", "response": "a"},
            "question_answer",
            {"question": "query", "answer": "response"},
        ),
        ({"conversation": [{"input": "q", "output": "a"}]}, "messages", {"messages": "conversation"}),  # Capybara
        (
            {"problem": "q", "solution": "a", "examples": [{"input": "1", "output": "2"}]},  # of what a program does
            "question_answer",
            {"question": "problem", "answer": "solution"},
        ),
        (
            {"problem": "q", "solution": "a", "tests": {"input": ["1"], "output": ["2"]}},
            "question_answer",
            {"question": "problem", "answer": "solution"},
        ),
        ({"trajectory": json.dumps(TURNS)}, "messages", {"messages": "trajectory"}),
        ({"tools": "[]", "question": "q", "answer": "a"}, "question_answer", {}),
        ({"system_prompt": "s", "prompt": "q", "completion": "a"}, "prompt_completion", {"system": "system_prompt"}),
        ({"system_prompt": "s", "system": "t", "prompt": "q", "completion": "a"}, "prompt_completion", {}),
    ],
)
def test_formats_are_recognised(row, format, columns):
    found = recognise([row] * 3 + [RowError("not valid JSON")])
    assert found[:2] == (format, columns)
    assert found[2].startswith(f"3 of 4 sampled rows are {format}")
    to_messages(row, format, columns)


def test_what_is_not_recognised_is_said():
    format, columns, found = recognise([{"a\n# b": 1, "text": "x"}])
    assert (format, columns) == ("auto", {})
    assert found == (
        "CHANGE: none of 1 sampled rows can be used; "
        "1: no known columns (set data.format and data.columns) – columns: a # b, text"
    )


def test_what_is_wrong_with_a_known_format_is_said():
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]}] * 2
    assert recognise(rows)[2].endswith("none of 2 sampled rows can be used; 2: unknown role – 'bot' in turn 2")
    found = recognise([chat("q", "a"), *rows])
    assert found == ("messages", {}, "1 of 3 sampled rows are messages; 2: unknown role – 'bot' in turn 2")


@pytest.mark.parametrize(
    "row",
    [
        {"dialogue": json.dumps(TURNS[:1]), "response": "a"},  # the JSON would be the question's text
        {"output": json.dumps(TURNS[:1])},
        {"turns": ["q1", "q2"], "category": "c"},  # MT-Bench's, all of which are questions
        {"tests": {"input": ["1"], "output": ["2"]}},
    ],
)
def test_what_looks_like_a_conversation(row):
    format, _, found = recognise([row])
    assert format == "auto"
    assert found.startswith("CHANGE: none of 1 sampled rows can be used")


def test_one_conversation_that_ends_in_a_question_is_not_all_of_them():
    rows = [{"messages": TURNS * 2, "answer": "42"} for _ in range(3)]
    rows[0] = {"messages": TURNS + TURNS[:1], "answer": "42"}
    assert recognise(rows)[:2] == ("messages", {})


def test_bad_completions_are_not_rows_of_another_format():
    """As TRL has them for KTO."""
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    found = "1 of 2 sampled rows are prompt_completion; 1: the completion is a bad one – label is false"
    assert recognise(rows) == ("prompt_completion", {}, found)


def test_rows_of_several_formats_are_left_to_auto():
    rows = [chat("q", "a"), {"instruction": "q", "output": "a"}, {"conversations": TURNS}]
    assert recognise(rows) == ("auto", {}, "3 of 3 sampled rows are of several formats")


def test_the_config_loads_and_is_commented(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my # rows.jsonl", [{"dialogue": TURNS}] * 4)
    assert cli.main(["init", "my # rows.jsonl", "--base", "my/base", "--reference", '/models/it\'s "tuned"']) == 0
    assert capsys.readouterr().out == "4 of 4 sampled rows are messages, messages from dialogue; wrote run.yaml\n"
    config = load_config("run.yaml", [])
    assert config.data.path == ("my # rows.jsonl",)
    assert config.output == "runs/my # rows"
    assert config.data.columns == {"messages": "dialogue"}
    assert (config.model.base, config.model.reference) == ("my/base", '/models/it\'s "tuned"')
    text = (tmp_path / "run.yaml").read_text()
    assert "\n# What it will cost, before it is run: tokenclean estimate run.yaml --gpu h100\n" in text
    assert all("#" in line for line in text.splitlines() if not line.endswith(":"))


def test_the_commands_that_it_names_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [chat("q", "a")])
    assert cli.main(["init", "rows.jsonl", "--out", "my run.yaml"]) == 0
    commands = re.findall(r": tokenclean (.*)", (tmp_path / "my run.yaml").read_text())
    assert [shlex.split(command)[1] for command in commands] == ["my run.yaml"] * 3


def test_a_file_that_is_there_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [chat("q", "a")])
    (tmp_path / "run.yaml").write_text("mine")
    assert cli.main(["init", "rows.jsonl"]) == 2
    assert "run.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"
    assert cli.main(["init", "rowz.jsonl", "--out", "new.yaml"]) == 2
    assert "did you mean rows.jsonl?" in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()
    assert cli.main(["init", "rows.jsonl", "--out", "sub/new.yaml"]) == 0
    assert load_config("sub/new.yaml", []).data.format == "messages"


@pytest.mark.parametrize(
    ("files", "note"),
    [
        (["train.jsonl", "contest.jsonl"], ""),
        (["train_sft-0.jsonl", "test_sft-0.jsonl"], "; 1 of 2 files look like test splits, as rows/test_sft-0.jsonl"),
        (["test-0.jsonl", "test-1.jsonl"], ""),
        (["all/a.jsonl", "math/a.jsonl"], "; 2 folders are read, as rows/all, which may hold the same rows"),
        (
            ["all/train.jsonl", "all/Validation.jsonl", "math/train.jsonl", "math/val.jsonl"],
            "; 2 of 4 files look like test splits, as rows/all/Validation.jsonl"
            "; 2 folders are read, as rows/all, which may hold the same rows",
        ),
    ],
)
def test_files_that_may_not_be_meant_are_named(tmp_path, monkeypatch, capsys, files, note):
    """A folder or a dataset of the hub is read whole, as datasets does not."""
    monkeypatch.chdir(tmp_path)
    for file in files:
        write_rows(tmp_path / "rows" / file, [chat("q", "a")])
    assert cli.main(["init", "rows"]) == 0
    way_out = f"{note}: name the files to train on in data.path, by a glob" if note else ""
    assert (
        capsys.readouterr().out == f"{len(files)} of {len(files)} sampled rows are messages{way_out}; wrote run.yaml\n"
    )
    assert way_out in (tmp_path / "run.yaml").read_text()
