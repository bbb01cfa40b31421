"""Training whose workers, nodes or driver die: from where it goes on, when it ends, and what it says then."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import ray
import torch
from conftest import run_python, wait_for
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import ControllerError, Result, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from raylets import Cluster, processes
from test_train import config_for, masked_rows, newest_step, train_process, weights, write_masked

from tokenclean_ray import rounds, train
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import TRAINED, Store
from tokenclean_ray.models import NO_CUDA, describe
from tokenclean_ray.train import _explained, job_for


def train_workers():
    """Those of this process's Ray: others may run the same tests on this machine."""
    return processes(psutil.Process(), "RayTrainWorker")


def newest_step_after(workers, folder):
    """The last that they have saved, which they may do until they end."""
    psutil.wait_procs(workers, timeout=60)
    return newest_step(folder)


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
def test_everything_killed_goes_on_from_the_checkpoint_to_the_same_weights(tmp_path, start):
    """kill -9 of driver, raylet and two workers after a checkpoint, then of a worker alone; LoRA dropout on."""
    write_masked(tmp_path / "data", masked_rows(60))
    settings = {"num_workers": 2, "epochs": 8, "checkpoint_every_steps": 5, "learning_rate": 1e-3}
    settings["lora"] = {"r": 4, "alpha": 8, "dropout": 0.2}
    first = train_process(tmp_path, "killed", start, **settings)
    wait_for(lambda: newest_step(tmp_path / "killed") or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    workers = train_workers()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    subprocess.run(["pkill", "-9", "-g", str(first.pid)], check=False)
    assert not list((tmp_path / "killed").rglob("tokenclean.json"))
    step = newest_step_after(workers, tmp_path / "killed")
    second = train_process(tmp_path, "killed", start, **settings)
    wait_for(lambda: newest_step(tmp_path / "killed") != step)
    workers = train_workers()
    assert len(workers) >= 2
    workers[0].kill()
    out, err = second.communicate(timeout=900)
    assert second.returncode == 0, err
    whole = rounds.train(config_for(tmp_path, start, **settings))
    (one,), other = list((tmp_path / "killed" / "models").iterdir()), Path(whole["path"])
    manifests = [json.loads((folder / "tokenclean.json").read_text()) for folder in (one, other)]
    assert manifests[0]["steps"] == manifests[1]["steps"] == 64 > step
    assert manifests[0]["loss"] == manifests[1]["loss"]
    left, right = weights(one), weights(other)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert "64 steps" in out


class Failing:
    """A trainer whose workers die; each of its runs brings training's newest checkpoint to an update, until None."""

    def __init__(self, job, saved, error):
        self.job, self.saved, self.error = job, iter(saved), error

    def fit(self):
        saved = next(self.saved)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray, which leaves its own handler
        if saved is None:
            return Result(metrics=None, checkpoint=None, error=None, path="", return_value={"a": 1})
        self.job.store.write_json(train._progress_file(self.job), {"saved": saved})
        raise self.error


DIED = WorkerGroupError("cut", {0: RuntimeError("Connection closed by peer"), 1: RayActorError()})

LEFT = ControllerError(ActorUnavailableError("The actor is unavailable: Connection reset by peer", b"1" * 16))


@pytest.mark.parametrize(
    ("saved", "left", "error"),
    [
        ([0, 0, 0, None], 0, DIED),
        ([200, 400, 400, 600, 800, 1000, 1000, 1000, None], 0, DIED),  # a night on nodes that come and go
        ([0, 0, 0, None], 0, LEFT),
        ([0, 0, 0, 0, None], 1, DIED),
        ([0, 0, 0, 0, None], 1, LEFT),
        ([200, 200, 200, 200, None], 1, DIED),
        ([400, 200, 400, 200, None], 1, DIED),  # a checkpoint that Ray's controller did not hear of is made again
        ([0, None], 1, ControllerError(RuntimeError("of Ray's own"))),
    ],
)
def test_training_whose_workers_die_goes_on_as_long_as_it_comes_further(
    tmp_path, start, saved, left, error, capfd, monkeypatch
):
    freed, interrupts = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "_places", set)
    monkeypatch.setattr(train, "_free_places", freed.append)
    of = describe(start)
    job = job_for(Store(str(tmp_path)), "trained", [], "", of, config_for(tmp_path, start), of)
    trainer = Failing(job, saved, error)
    if left:
        with pytest.raises((UserError, ControllerError)):
            train._fit(trainer, job)
    else:
        assert train._fit(trainer, job) == {"a": 1}
        said = capfd.readouterr().err
        goes_on = r"training goes on from its newest checkpoint \((RayActor|ActorUnavailable)Error: "
        assert len(re.findall(goes_on, said)) == len(freed) == len(saved) - 1
    assert len(list(trainer.saved)) == left
    assert signal.getsignal(signal.SIGINT) == interrupts


def test_training_that_has_ended_is_not_tried_again(tmp_path, start, monkeypatch):
    """Ray's controller may fail to reach workers as it ends them, after the first has written the model."""
    freed, places = [], iter([{"the caller's"}, {"the caller's", "left"}])
    monkeypatch.setattr(train, "_places", lambda: next(places))
    monkeypatch.setattr(train, "_free_places", freed.append)
    of = describe(start)
    job = job_for(Store(str(tmp_path)), "trained", [], "", of, config_for(tmp_path, start), of)
    job.store.write_json(f"models/{job.name}/{TRAINED}", {"files": []})
    assert train._fit(Failing(job, [200], LEFT), job) == {}
    assert freed == [{"left"}]  # for what comes next


OTHER_JOB = """
import sys
import ray
ray.init(namespace=sys.argv[1], logging_level="error")
ray.get(ray.util.placement_group([{"CPU": 0.01}], name="others", lifetime="detached").ready())
"""


@pytest.mark.usefixtures("ray_session")
def test_what_a_failed_training_has_left_is_not_waited_for():
    """Placement groups, as Ray's controller leaves them where it cannot reach a worker that it is to end."""
    run_python(OTHER_JOB, ray.get_runtime_context().namespace)
    others = ray.util.get_placement_group("others")
    before = train._places()
    groups = [ray.util.placement_group([{"CPU": cpus}]) for cpus in (0.01, 1000)]
    ray.get(groups[0].ready())
    left = train._places() - before
    assert left == {group.id.hex() for group in groups}
    train._free_places(left)
    wait_for(lambda: all(ray.util.placement_group_table(group)["state"] == "REMOVED" for group in groups))
    assert not train._places() & left
    assert ray.util.placement_group_table(others)["state"] == "CREATED"
    ray.util.remove_placement_group(others)


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
def test_workers_that_die_more_often_than_training_is_tried_again_without_a_checkpoint(tmp_path, start):
    write_masked(tmp_path / "data", masked_rows(60))
    settings = {"num_workers": 2, "learning_rate": 1e-4, "epochs": 400, "checkpoint_every_steps": 20}
    job, step = train_process(tmp_path, "run", start, **settings), 0

    def come_further():
        assert job.poll() is None, job.communicate()
        return len(train_workers()) == 2 and newest_step(tmp_path / "run") > step

    for _ in range(train.WORKER_FAILURES + 2):
        wait_for(come_further)
        workers = train_workers()
        workers[-1].kill()
        step = newest_step_after(workers, tmp_path / "run")
    wait_for(come_further)
    os.killpg(job.pid, signal.SIGKILL)  # its end is that of any training
    job.communicate()


@pytest.mark.faults
def test_nodes_that_die_more_often_than_training_is_tried_again_without_a_checkpoint(tmp_path, start):
    """Half of the time Ray's controller has an error of its own then, and leaves the workers' places taken."""
    write_masked(tmp_path / "data", masked_rows(60))
    settings = {"num_workers": 3, "method": "full", "learning_rate": 1e-4, "epochs": 400, "checkpoint_every_steps": 20}
    with Cluster() as cluster:
        job, step = train_process(tmp_path, "run", start, cluster.environment, **settings), 0

        def come_further():
            assert job.poll() is None, job.communicate()
            return len(cluster.processes("RayTrainWorker")) == 3 and newest_step(tmp_path / "run") > step

        for _ in range(train.WORKER_FAILURES + 1):
            wait_for(come_further)
            workers = cluster.processes("RayTrainWorker")
            cluster.processes("raylet/raylet")[-1].kill()  # each node has a worker
            cluster.order("add")
            step = newest_step_after(workers, tmp_path / "run")
        wait_for(come_further)
        os.killpg(job.pid, signal.SIGKILL)  # its end is that of any training
        job.communicate()


CUT = "Training failed due to worker errors: (Ray cuts the middle out of long messages)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WorkerGroupError(CUT, {1: torch.OutOfMemoryError("CUDA out of memory. Tried")}), r"lower train\.batch_tokens"),
        (WorkerGroupError("NODE_OUT_OF_MEMORY: a worker was killed", {0: Exception()}), r"lower train\.batch_tokens"),
        (WorkerGroupError(CUT, {0: OSError(28, "No space left on device")}), "OSError: .*No space left.*; the same"),
        (WorkerGroupError(CUT, {0: RayActorError()}), "training workers keep dying .*; the same command goes on"),
        (WorkerGroupError(CUT, {0: WorkerHealthCheckFailedError("", RayActorError())}), "training workers keep dying"),
        (LEFT, "training workers keep dying .*; the same command goes on"),
        (ControllerError(RuntimeError("Distributed package doesn't have NCCL built in")), NO_CUDA),
        (WorkerGroupError(CUT, {0: KeyError("x")}), None),
    ],
)
def test_what_ends_training_is_told_in_one_line(error, expected):
    said = _explained(error)
    assert (said is None) if expected is None else re.search(expected, said)


def test_what_helps_against_lack_of_memory_goes_on_with_the_same_training(tmp_path, start):
    def name(**train):
        of = describe(start)
        return job_for(Store("x"), "trained", [], "", of, config_for(tmp_path, start, **train), of).name

    smaller = name(batch_tokens=32, num_workers=4, activation_checkpointing=False)
    assert smaller == name() != name(batch_rows=4)
