"""What the user can mend is one line on stderr and exit code 2; every help fits a terminal."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import run_python
from fsspec.registry import _registry

from tokenclean_ray import __version__, cli
from tokenclean_ray.study import run as study
from tokenclean_ray.study.real_text import Text

CONSOLE_SCRIPT = Path(sys.executable).with_name("tokenclean")
COMMANDS = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.fixture
def config(tmp_path, monkeypatch, model_pair):
    """A config whose inputs are all there."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    base, reference = model_pair
    values = {"output": "run", "data": {"path": "rows.jsonl"}, "model": {"base": base, "reference": reference}}
    Path("run.yaml").write_text(yaml.safe_dump(values))
    return "run.yaml"


def help_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["select.keep_ration=0.5"], "unknown key select.keep_ration; did you mean keep_ratio?"),
        (["select.keep_ratio=2"], "select.keep_ratio"),
        (["keep_ratio"], "override 'keep_ratio' is not of the form section.key=value"),
        (["model.reference=[a]"], "model.reference"),
        (["data.path=row.jsonl"], "data.path row.jsonl does not exist; did you mean rows.jsonl?"),
        (["data.path=run.yaml"], "data.path run.yaml: unknown kind of file"),
        (["data.warmup=row.jsonl"], "data.warmup row.jsonl does not exist; did you mean rows.jsonl?"),
        (["data.path=nosuch://x"], "Protocol not known: nosuch"),
        (["model.base=/nowhere/base"], "model /nowhere/base: no such folder"),
        (["model.reference=."], "model .: the folder has no config.json"),
        (["data.template=chat", "data.max_length=1"], "data.max_length"),
    ],
)
def test_what_the_user_can_mend(config, capsys, overrides, expected):
    assert cli.main(["clean", config, *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenclean: error: ")
    assert expected in err
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not os.path.exists("run")


@pytest.mark.parametrize("command", [["report"], ["inspect"], ["export", "--to", "trl", "--out", "out"]])
def test_a_store_that_fails_is_said_in_one_line(capsys, tmp_path, command):
    (tmp_path / "run.json").mkdir()  # reading it fails, whoever reads
    assert cli.main([*command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenclean: error: IsADirectoryError: ")


def test_missing_config(config, capsys):
    assert cli.main(["clean", "rum.yaml"]) == 2
    assert capsys.readouterr().err == (
        "tokenclean: error: config file rum.yaml does not exist; did you mean run.yaml?\n"
    )


def test_a_run_folder_and_a_config_are_told_apart(config, capsys):
    for command in ("report", "inspect", "status", "export"):
        more = ["--to", "trl", "--out", "out"] if command == "export" else []
        assert cli.main([command, config, *more]) == 2
        assert capsys.readouterr().err.startswith(f"tokenclean: error: {config} is no run folder: ")
    Path("runs").mkdir()
    assert cli.main(["clean", "runs"]) == 2
    assert capsys.readouterr().err == (
        "tokenclean: error: runs is a folder: give the YAML file that its run was started from\n"
    )


@pytest.mark.parametrize("command", ["clean", "estimate"])
def test_a_missing_argument_is_named_alone(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: the following arguments are required: run.yaml\n")


@pytest.mark.parametrize("launcher", [[CONSOLE_SCRIPT, "clean"], [sys.executable, Path("jobs/clean.py").resolve()]])
def test_a_process_fails_in_one_line(config, launcher):
    done = subprocess.run([*launcher, config, "score.batch_token=1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "tokenclean: error: unknown key score.batch_token; did you mean batch_tokens?\n"


def test_a_typo_costs_no_heavy_import(config):
    code = "import sys, tokenclean_ray.cli as c; print(c.main(sys.argv[1:]), {'torch', 'ray'} & set(sys.modules))"
    assert run_python(code, "clean", config, "sead=1") == "2 set()\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["status", "URL"], ["report", "URL"], ["inspect", "URL"], ["export", "URL", "--to", "trl", "--out", "x"]),
        *(["clean", "run.yaml", "output=URL"], ["clean", "run.yaml", "model.base=URL"]),
        ["clean", "run.yaml", "data.path=URL/a.jsonl"],
    ],
)
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nosuch://b/x", "Protocol not known: nosuch"),
        ("s3://b/x", "Install s3fs to access S3, on every node"),
        ("abfs://b/x", "Install adlfs [^\n]*Storage, on every node"),  # no extra brings it
    ],
)
def test_a_store_that_this_installation_does_not_know(capsys, monkeypatch, config, arguments, url, expected):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as without the extra
    monkeypatch.setitem(sys.modules, "adlfs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    assert cli.main([argument.replace("URL", url) for argument in arguments]) == 2
    assert re.fullmatch(rf"tokenclean: error: [^\n]*{url}[^\n]*{expected}[^\n]*\n", capsys.readouterr().err)


def test_overrides_behind_a_flag(config, capsys):
    assert cli.main(["estimate", config, "--gpu", "h100", "data.max_length=0"]) == 2
    assert "data.max_length" in capsys.readouterr().err
    for unknown in (["estimate", config, "--gpus", "8"], ["status", "runs/a", "runs/b"]):
        with pytest.raises(SystemExit):
            cli.main(unknown)
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (SystemExit, 143)])
def test_a_stop_is_no_traceback(capsys, monkeypatch, stop, code):
    def stopped(options):
        raise stop

    monkeypatch.setattr(cli, "_status", stopped)
    assert cli.main(["status", "runs/a"]) == code
    assert capsys.readouterr().err == "tokenclean: stopped; the same command goes on where this run ended\n"


@pytest.mark.parametrize("prints", ["print", "rich.print"])
def test_a_reader_that_has_left(tmp_path, prints):
    """As `| head` does: little output lies in a buffer until the end, and rich makes a SystemExit of its error."""
    code = f"import rich, sys; from tokenclean_ray import cli; cli._status = lambda _: {prints}('a line')"
    gone, end = os.pipe()
    os.close(gone)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(cli.main(['status', 'runs/a']))"],
        stdout=end, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""}, timeout=300, check=False,
    )  # fmt: skip
    os.close(end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--workers 0", "--workers must be at least 1, not 0"),
        ("--seeds 0", "--seeds must be at least 1, not 0"),
        ("--model m", "--test and --model are of --data, rows of your own, which is missing"),
        ("--test rows.jsonl", "--test and --model are of --data, rows of your own, which is missing"),
        ("--data rows.jsonl", "--data wants --test, clean rows, and --model, what the base is trained from"),
        (
            "--sweep --data rows.jsonl --test rows.jsonl --model m",
            "--sweep is of the made-up task, and --data of another: leave one out",
        ),
    ],
)
def test_flags_of_study_that_do_not_go_together(capsys, arguments, expected):
    assert cli.main(["study", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"tokenclean: error: {expected}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("jobs/results/study", range(5), study.CORE, None)),
        (["--seeds", "3", "--workers", "2", "--output", "out"], ("out", range(3), study.CORE, 2)),
        (["--sweep", "--seeds", "2"], ("jobs/results/study", range(2), study.SWEEP, None)),
        (
            ["--data", "a.jsonl", "--test", "b.jsonl", "--model", "small"],
            ("jobs/results/study", range(5), study.text_settings(Text("a.jsonl", "b.jsonl", "small")), None),
        ),
    ],
)
def test_the_study_that_is_asked_for_is_run(monkeypatch, arguments, expected):
    ran = []
    monkeypatch.setattr(study, "run", lambda *given: ran.append(given))
    assert cli.main(["study", *arguments]) == 0
    assert ran == [expected]


HUB = """
import shlex, sys
from tokenclean_ray import cli
for command in sys.stdin:
    print(cli.main(shlex.split(command)), flush=True)
"""


@pytest.mark.usefixtures("config")
def test_a_hub_that_cannot_be_reached(tmp_path):
    """A process of its own, because the hub's address is read at import."""
    commands = [
        "clean run.yaml model.base=owner/name",
        "clean run.yaml data.path=hf://datasets/owner/name",
        "init hf://datasets/owner/name --out other.yaml",
        "evaluate owner/name --suite paper",
    ]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HUB], input="\n".join(commands), cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["2"] * len(commands)
    errors = [line for line in done.stderr.splitlines() if line.startswith("tokenclean: error: ")]
    assert len(errors) == len(commands)
    assert all("owner/name" in error for error in errors)


@pytest.mark.parametrize("arguments", [[], ["claen", "run.yaml"], ["clean"]])
def test_bad_command_lines_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: tokenclean")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: " ".join(c) or "tokenclean")
def test_help_fits_a_terminal_and_shows_an_example(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, *command)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert " ".join(["tokenclean", *(command or ["clean"])]) in text.partition("example")[2]


def test_help_names_every_command(capsys):
    text = help_of(capsys)
    assert "clean" in COMMANDS
    assert all(f"\n    {name} " in text for name in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tokenclean_ray {__version__}\n"
