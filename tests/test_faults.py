"""Processes killed for real, at random, in every stage: the same command then ends in what an undisturbed run makes.

A repetition is a schedule drawn from a seed, which names the test: `FAULTS=200 make test-faults` runs many,
`FAULTS=1 FAULT_SEED=17 make test-faults` replays the one with seed 17.
"""

import contextlib
import glob
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, chat, make_llama, save, write_rows
from raylets import Cluster
from safetensors.torch import load_file
from test_rounds import WORDS

from tokenclean_ray.layout import Store
from tokenclean_ray.score_actors import ACTOR_RESTARTS

pytestmark = pytest.mark.faults

FIRST = int(os.environ.get("FAULT_SEED", "0"))
SEEDS = range(FIRST, FIRST + int(os.environ.get("FAULTS", "3")))
FEWER = SEEDS[: max(1, len(SEEDS) // 4)]  # of the jobs that take longer
DEADLINE_S = 900  # machines that share their cores may be very slow


@dataclass(frozen=True)
class Fault:
    """What is killed once so many files match a pattern in the run folder."""

    target: str
    files: str
    count: int


def schedule(seed, stages, targets, faults=3):
    """Some faults; the stages that a pattern stands for are met in any order, since each attempt passes all of them."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(faults):
        files, most = rng.choice(list(stages.items()))
        drawn.append(Fault(rng.choice(targets), files, rng.randint(1, most)))
    print(f"seed {seed}:", *drawn, sep="\n  ")
    return drawn


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def case(tmp_path_factory, tokenizer):
    """Data of about 25 parts, and models that take a while for each."""
    folder = tmp_path_factory.mktemp("faults")
    rng = random.Random(0)

    def words(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def rows(count):
        return [chat(words(2, 12), words(10, 60)) | {"id": n, "source": f"s{n % 3}"} for n in range(count)]

    wide = {"hidden_size": 64, "intermediate_size": 4096}
    values = {
        "data": {"path": write_rows(folder / "data.jsonl", rows(150)), "part_bytes": 2048},
        "model": {
            "base": save(folder / "base", make_llama(0, scale=3.0, **wide), tokenizer),
            "reference": save(folder / "reference", make_llama(1, scale=3.0, **wide), tokenizer),
        },
        "score": {"num_actors": 2},
        "train": {"num_workers": 2, "batch_rows": 8, "checkpoint_every_steps": 3, "learning_rate": 1e-3},
    }
    values["train"]["lora"] = {"r": 4, "alpha": 8, "dropout": 0.1}
    write_rows(folder / "warmup.jsonl", rows(40))
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder


def start(cluster, case, command, output, *overrides):
    job = [sys.executable, str(ROOT / "jobs" / f"{command}.py"), "run.yaml", f"output={output}", *overrides]
    return subprocess.Popen(
        job, cwd=case, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(driver):
    """What it printed; fails where it failed."""
    out, _ = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, out
    return out


def strike(cluster, driver, target):
    """Returns whether the command has to be given again; None where it ended before there was something to kill."""
    match target:
        case "driver":
            driver.kill()
        case "everything":
            driver.kill()
            cluster.kill()
            cluster.start()
        case "raylet":
            raylets = cluster.processes("raylet/raylet")
            raylets[-1].kill()  # the first is the head's, on which the driver lives
            cluster.order("add")  # joins late
        case "leave":
            cluster.order("add")
            cluster.order("remove")
        case _:
            while not killed(cluster, target):
                if driver.poll() is not None:
                    return None
                time.sleep(0.02)
    return target in ("driver", "everything")


def killed(cluster, target):
    """Whether there was a process to kill that had not ended by itself meanwhile."""
    if found := cluster.processes(target):
        time.sleep(0.5)  # see kill_new_actors
        with contextlib.suppress(psutil.NoSuchProcess):
            found[0].kill()
            return True
    return False


def listed(folder, files):
    """By `glob`: that of paths fails in Python 3.11 where a folder goes that it has seen."""
    return map(Path, glob.glob(f"{folder}/{files}", recursive=True))


def committed(folder):
    """The files that are complete, and what tells that one was written again."""
    found = {}
    parts = listed(folder, "**/part-*.parquet")
    for path in [*parts, *listed(folder, "models/*/tokenclean.json")]:
        if "encoded" not in path.parts or "-" not in path.stem.removeprefix("part-"):  # a split is no whole part
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found[path] = (stat.st_ino, stat.st_mtime_ns)
    return found


def run_through(cluster, case, command, output, faults, *overrides):
    """Give a command until it ends, with faults on the way; fails where what was complete is written again."""
    driver = start(cluster, case, command, output, *overrides)
    folder, done, struck = case / output, {}, 0
    try:
        for fault in faults:
            if not wait_for(driver, folder, fault.files, fault.count):
                break  # done, or failed, which `finish` tells
            done |= committed(folder)
            ended = strike(cluster, driver, fault.target)
            struck += ended is not None
            if ended:
                driver.communicate()
                driver = start(cluster, case, command, output, *overrides)
        finish(driver)
    finally:
        driver.kill()
    assert struck, "nothing was killed"
    now = committed(folder)
    again = [str(path) for path, stamp in done.items() if now.get(path) != stamp]
    assert not again, f"complete, and yet written again: {again}"


def wait_for(driver, folder, files, count=1):
    """Whether the files are there before the driver ends."""
    deadline = time.monotonic() + DEADLINE_S
    while driver.poll() is None and len(list(listed(folder, files))) < count:
        assert time.monotonic() < deadline, f"{files} were never there"
        time.sleep(0.01)
    return driver.poll() is None


def masked(folder):
    """Rows by identity; fails where one is there twice."""
    store = Store(str(folder))
    snapshot = f"masked/{store.read_json('masked/latest.json')['snapshot']}"
    parts = store.read_json(f"{snapshot}/manifest.json")["parts"]
    assert set(parts) == store.part_names(snapshot)
    rows = [row | {"part": part} for part in parts for row in store.read_part(snapshot, part).to_pylist()]
    found = {(row["part"], row["row"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def record(folder):
    return json.loads((folder / "run.json").read_text())


def models(folder):
    """name → weights."""
    return {path.parent.name: load_file(path) for path in folder.glob("models/*/*.safetensors")}


def same_models(one, other):
    assert one.keys() == other.keys()
    assert one
    for name, weights in one.items():
        assert all(weight.equal(other[name][key]) for key, weight in weights.items()), name


@pytest.fixture(scope="module")
def cleaned(cluster, case):
    """An undisturbed `clean`."""
    finish(start(cluster, case, "clean", "cleaned"))
    return case / "cleaned"


CLEAN = {"lock/*.json": 1, "encoded/*.parquet": 20, "losses/*/*.parquet": 45, "masked/*/*.parquet": 15}


@pytest.mark.parametrize("seed", SEEDS)
def test_clean(cluster, case, cleaned, seed):
    faults = schedule(seed, CLEAN, ["ScoringActor", "ray::", "raylet", "driver", "everything", "leave"])
    run_through(cluster, case, "clean", f"clean-{seed}", faults)
    folder = case / f"clean-{seed}"
    assert masked(folder) == masked(cleaned)
    assert record(folder)["threshold"] == record(cleaned)["threshold"]
    assert record(folder)["counts"] == record(cleaned)["counts"]
    for losses in (cleaned / "losses").iterdir():
        assert {p.name: p.read_bytes() for p in losses.iterdir()} == {
            p.name: p.read_bytes() for p in (folder / "losses" / losses.name).iterdir() if p.name[0] != "."
        }


TRAIN = {"lock/*.json": 1, "train/*/checkpoint_*": 2}


@pytest.mark.parametrize("seed", FEWER)
def test_train(cluster, case, cleaned, seed):
    data = f"train.data={cleaned}"
    if not (case / "trained").exists():
        finish(start(cluster, case, "train", "trained", data))
    faults = schedule(seed, TRAIN, ["RayTrainWorker", "raylet", "driver", "everything"], 2)
    run_through(cluster, case, "train", f"train-{seed}", faults, data)
    same_models(models(case / f"train-{seed}"), models(case / "trained"))


EVOLVE = {"encoded/*.parquet": 20, "losses/*/*.parquet": 30, "train/*/checkpoint_*": 3, "models/*/tokenclean.json": 2}


@pytest.mark.parametrize("seed", FEWER)
def test_evolve(cluster, case, seed):
    settings = ["model.reference=null", "data.warmup=warmup.jsonl", "evolve.num_subsets=2"]
    if not (case / "evolved").exists():
        finish(start(cluster, case, "evolve", "evolved", *settings))
    targets = ["ScoringActor", "RayTrainWorker", "raylet", "driver", "everything"]
    run_through(cluster, case, "evolve", f"evolve-{seed}", schedule(seed, EVOLVE, targets), *settings)
    one, other = case / f"evolve-{seed}", case / "evolved"
    same_models(models(one), models(other))
    assert masked(one) == masked(other)
    assert record(one)["counts"] == record(other)["counts"]


def kill_new_actors(cluster, driver, most):
    """Kill scoring actors half a second after they are there, while they still load their models. Returns how many.

    Killed in the instant that it gets its actor, a worker may leave Ray 2.60 with an actor that restarts for ever.
    """
    seen, killed = {}, set()
    while driver.poll() is None and len(killed) < most:
        for actor in cluster.processes("ScoringActor"):
            began = seen.setdefault(actor, time.monotonic())
            if actor not in killed and time.monotonic() > began + 0.5:
                with contextlib.suppress(psutil.NoSuchProcess):
                    actor.kill()
                    killed.add(actor)
        time.sleep(0.02)
    return len(killed)


def test_actors_that_die_while_loading_are_replaced(cluster, case, cleaned):
    driver = start(cluster, case, "clean", "loading")
    assert kill_new_actors(cluster, driver, 2) >= 2
    finish(driver)
    assert masked(case / "loading") == masked(cleaned)


def test_actors_that_always_die_end_the_job_in_one_line(cluster, case):
    driver = start(cluster, case, "clean", "hopeless")
    assert kill_new_actors(cluster, driver, 1000) > ACTOR_RESTARTS
    out, _ = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 2, out
    assert "Traceback" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("tokenclean: error: ")]  # among what raylets say
    assert line.startswith("tokenclean: error: workers keep dying (")


@pytest.mark.parametrize(
    ("command", "files"), [("clean", "losses/*/*.parquet"), ("train", "train/*/checkpoint_*")], ids=["clean", "train"]
)
def test_a_run_that_lost_its_lock_stops_in_the_middle(cluster, case, cleaned, command, files):
    driver = start(cluster, case, command, f"lost-{command}", f"train.data={cleaned}", "train.epochs=40")
    folder = case / f"lost-{command}"
    assert wait_for(driver, folder, files)
    store = Store(str(folder))
    (mine,) = store.names("lock")
    assert store.create_bytes("lock/00000002.json", json.dumps(store.read_json(f"lock/{mine}")).encode())
    out, _ = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 2, out
    assert "took over" in out.splitlines()[-1]
    assert not list(folder.glob("masked/latest.json"))
    assert not list(folder.glob("models/*/tokenclean.json"))
