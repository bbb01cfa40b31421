"""`tokenclean status`: a run at work, ended, failed, died, and a folder that is none."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for

from tokenclean_ray import cli, lock, progress
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.progress import Stage
from tokenclean_ray.status import describe

RUNNING = """
import sys, time
from tokenclean_ray import lock
from tokenclean_ray.layout import Store
from tokenclean_ray.progress import Stage

lock.HEARTBEAT_S = 0.2
with lock.hold(Store(sys.argv[1]), "clean"), Stage("score", 8, 1000) as stage:
    stage.advance(rows=20, tokens=250)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_stage_before(monkeypatch):
    monkeypatch.setattr(progress, "_newest", None)


def elsewhere(folder):
    """A run in another process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", RUNNING, folder], stdout=subprocess.PIPE, env=environment)
    assert run.stdout.readline() == b"ready\n"
    return run


def test_a_run_at_work_elsewhere_then_killed(tmp_path, capsys):
    folder = str(tmp_path / "run")
    run = elsewhere(folder)
    try:
        wait_for(lambda: "score" in describe(folder))  # the first beat
        assert cli.main(["status", folder]) == 0
        out = capsys.readouterr().out
        assert f"running (tokenclean clean, process {run.pid} on " in out
        assert "stage     score, 1 of 8 parts, 20 rows, 25% of the tokens, " in out
        assert " s left" in out
    finally:
        run.kill()
        run.wait()
    assert "no sign of life (tokenclean clean" in describe(folder)
    assert "goes on where this run ended" in describe(folder)


def test_how_a_run_ended(tmp_path):
    store = Store(str(tmp_path / "run"))
    with pytest.raises(UserError, match="no memory"), lock.hold(store, "clean"), Stage("encode", 3):
        raise UserError("no memory for it: buy some")
    assert "failed: no memory for it: buy some (tokenclean clean" in describe(store.url)
    assert "stage     encode, 0 of 3 parts" in describe(store.url)
    with lock.hold(store, "clean"), Stage("mask", 2) as stage:
        stage.advance(parts=2, rows=7, note="all well")
    store.write_json("run.json", {"result": {"path": "x/masked/v0001"}, "counts": {"masked": 7, "rows": 9}})
    text = describe(store.url)
    assert "finished (tokenclean clean" in text
    assert "stage     mask, 2 of 2 parts, 7 rows, all well" in text
    assert "result    x/masked/v0001: 7 of 9 rows" in text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_was_stopped_has_not_failed(tmp_path, stop):
    store = Store(str(tmp_path / "run"))
    with pytest.raises(stop), lock.hold(store, "clean"):
        raise stop
    assert describe(store.url).splitlines()[1].startswith("state     stopped (tokenclean clean, process ")


def test_an_error_of_any_kind_is_noted_without_secrets(tmp_path):
    store = Store(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="hunter2"), lock.hold(store, "train"):
        raise ValueError("at https://user:hunter2@host/x")
    (file,) = (tmp_path / "run" / "lock").iterdir()
    assert "hunter2" not in file.read_text()
    assert json.loads(file.read_text())["error"].startswith("ValueError: ")


def test_a_folder_without_a_run(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no run has been at work there" in capsys.readouterr().err
