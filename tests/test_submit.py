"""`ray start --head`, its job server and `ray job submit --working-dir`: what a cluster runs, on one machine."""

import json
import re
import secrets
import subprocess
import time
import urllib.request

import psutil
import pytest
import raylets
from conftest import ROOT, chat, make_llama, run_python, save, wait_for, write_rows
from raylets import RAY, free_port

pytestmark = pytest.mark.faults

DEADLINE_S = 240


@pytest.fixture(scope="module")
def head():
    """The environment of a client: its server's address, and the token that it wants."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with raylets.head("--num-cpus=2", **token) as (environment, url):
        yield environment | {"RAY_ADDRESS": url}


def status(environment, job):
    """Of a job, None while the server is busy; the command line takes seconds to say it."""
    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    url = f"{environment['RAY_ADDRESS']}/api/jobs/{job}"
    try:
        # no longer: a driver that is to be killed in the middle works on meanwhile
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return json.load(answer)["status"]
    except OSError:
        return None


def run(environment, *arguments):
    return subprocess.run([RAY, "job", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


def submit(environment, name, config, *more):
    """Again where the server answers before the agent does that starts jobs: "please try again later".

    `more`: options of Ray's begin with dashes; the others override the config.
    """
    options = [one for one in more if one.startswith("--")]
    entry = ["--", "python", "jobs/clean.py", config, *(one for one in more if one not in options)]
    deadline = time.monotonic() + DEADLINE_S
    while True:
        done = run(environment, "submit", "--submission-id", name, "--working-dir", ".", *options, *entry)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer):
    """Some thirty parts, which take a while each."""
    folder = tmp_path_factory.mktemp("submit")
    rows = [chat(f"what is {n}", "one two three four " * (n % 7 + 3)) | {"id": n} for n in range(200)]
    wide = {"hidden_size": 64, "intermediate_size": 4096}
    values = {
        "output": str(folder / "run"),
        "data": {"path": write_rows(folder / "data.jsonl", rows), "part_bytes": 1024},
        "model": {
            n: save(folder / n, make_llama(i, scale=3.0, **wide), tokenizer)
            for i, n in enumerate(("base", "reference"))
        },
        "score": {"num_actors": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


def losses(config):
    return {path: path.stat().st_mtime_ns for path in config.parent.glob("run/losses/*/part-*.parquet")}


def driver(config):
    """The process of the job, wherever the job server started it."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(config) in line and "jobs/clean.py" in line and "python" in line[0]:
            return process
    return None


def test_a_driver_that_is_killed_goes_on_under_another_submission(head, config):
    first = submit(head, "clean-1", str(config), "--no-wait")
    assert first.returncode == 0, first.stdout + first.stderr
    wait_for(lambda: len(losses(config)) >= 4 or status(head, "clean-1") == "FAILED", DEADLINE_S)
    assert losses(config), run(head, "logs", "clean-1").stdout
    driver(config).kill()
    wait_for(lambda: status(head, "clean-1") == "FAILED", DEADLINE_S)
    before = losses(config)
    assert not (config.parent / "run" / "masked" / "latest.json").exists()
    second = submit(head, "clean-2", str(config))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "rows 200 = masked 200 + nothing kept 0 + rejected 0" in second.stdout
    logs = run(head, "logs", "clean-2").stdout
    assert "masked dataset: " in logs
    lines = rf"^\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ {config.parent}/run (plan|encode|score|mask) "
    assert set(re.findall(lines, logs, re.MULTILINE)) == {"plan", "encode", "score", "mask"}
    after = losses(config)
    assert len(after) > len(before)
    assert {path: after[path] for path in before} == before  # nothing was scored again


def test_an_output_that_would_go_with_the_job_is_refused(head, config):
    done = submit(head, "clean-4", str(config), "output=runs/x")
    assert done.returncode != 0
    logs = run(head, "logs", "clean-4").stdout
    assert "output runs/x is relative" in logs


def test_a_client_without_the_token_is_turned_away(head, config):
    without = head | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    assert submit(without, "clean-3", str(config)).returncode != 0
    assert "clean-3" not in run(head, "list").stdout


JOIN = """
import time
from tokenclean_ray.errors import UserError
from tokenclean_ray.workers import connect
began = time.monotonic()
try:
    connect()
except UserError as error:
    print(error)
print(time.monotonic() - began)
"""


def test_a_cluster_that_is_gone_is_said_to_be_within_minutes():
    """By itself Ray asks for it for a quarter of an hour, while the run folder is locked and nothing is said."""
    port = free_port()
    said, seconds = run_python(JOIN, RAY_ADDRESS=f"127.0.0.1:{port}", RAY_AUTH_MODE="disabled").splitlines()
    assert re.fullmatch(rf"the Ray cluster cannot be joined: .* [\d.]+:{port}", said)
    assert float(seconds) < 180
