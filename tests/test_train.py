"""Ray Train with FSDP2 on gloo: the gradient, the resume, the exported folder."""

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_llama, save, wait_for
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import ControllerError, Result, WorkerGroupError
from raylets import Cluster
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean_ray import rounds, train
from tokenclean_ray import trainable as how_it_is_trained
from tokenclean_ray.config import Train
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import IGNORED, Rows, fit
from tokenclean_ray.layout import TRAINED, Store
from tokenclean_ray.masked_rows import MaskedRows, check_rows
from tokenclean_ray.models import NO_CUDA, describe, vocabulary_fingerprint
from tokenclean_ray.token_loss import TokenLoss
from tokenclean_ray.train import _explained, _together, fine_tune, job_for
from tokenclean_ray.trainable import trainable

SETTINGS = {"num_workers": 1, "learning_rate": 1e-2, "batch_rows": 8, "batch_tokens": 64, "epochs": 2}


def masked_rows(count=30):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(4, 300, rng.integers(4, 24)).astype(np.int32)
        rows.append((ids, np.where(rng.random(len(ids)) < 0.4, ids, IGNORED).astype(np.int32)))
    return rows


def write_masked(folder, rows, parts=3):
    folder.mkdir(parents=True)
    for n in range(parts):
        some = rows[n::parts]
        table = pa.table({"input_ids": [i for i, _ in some], "labels": [k for _, k in some]})
        pq.write_table(table, folder / f"part-{n}.parquet")
    return [row for n in range(parts) for row in rows[n::parts]]  # in the order that files are read


@pytest.fixture
def start(tmp_path, tokenizer):
    model = make_llama(0, scale=2.0)
    model.generation_config.max_new_tokens = 7
    return save(tmp_path / "start", model, tokenizer)


def config_for(tmp_path, start, **train):
    values = {
        "output": str(tmp_path / "run"),
        "train": {"data": str(tmp_path / "data"), "model": start} | SETTINGS | train,
    }
    return build_config(values, "train")


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def distance(one, other):
    flat = [torch.cat([w.double().flatten() for w in state.values()]) for state in (one, other)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_sharded_training_equals_training_in_one_process(tmp_path, start):
    """Full fine-tuning, no dropout: workers and micro-batches change nothing but rounding."""
    rows = write_masked(tmp_path / "data", masked_rows())
    record = rounds.train(config_for(tmp_path, start, method="full", num_workers=2))
    model = AutoModelForCausalLM.from_pretrained(start)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    curve = fit(TokenLoss(model), Rows.of(rows), Train(**{**SETTINGS, "batch_tokens": 1000}))
    trained = weights(record["path"])
    assert record["loss"] == pytest.approx(curve, abs=1e-4)
    assert distance(model.state_dict(), before) > 0.05
    assert distance(trained, model.state_dict()) < 1e-3  # eight AdamW steps spread a rounding error
    assert record["steps"] == 8
    assert record["tokens"] == 2 * Rows.of(rows).kept.sum()


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision(tmp_path, start, method):
    """As on GPUs: what is trained stays in float32, passes compute in bfloat16, so losses are a little off."""
    rows = write_masked(tmp_path / "data", masked_rows())
    settings = {"method": method, "lora": {"r": 4, "dropout": 0.0}, "num_workers": 2}
    config = config_for(tmp_path, start, **settings)
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    record = rounds.train(half)
    whole = Train(**{**SETTINGS, **settings})
    loss_of = trainable(describe(start), whole, config.seed)
    curve = fit(loss_of, Rows.of(rows), whole)
    difference = np.abs(np.array(record["loss"]) - curve)
    assert 1e-5 < difference.mean() < 0.02
    trained = weights(record["path"])
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert distance(trained, weights(start)) > (0.05 if method == "full" else 0.01)
    jobs = [job_for(Store(str(tmp_path)), "x", [], "", describe(start), of, describe(start)) for of in (config, half)]
    assert jobs[0].name != jobs[1].name


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_lora_is_merged_into_an_ordinary_folder(tmp_path, start, capfd):
    write_masked(tmp_path / "data", masked_rows())
    record = rounds.train(config_for(tmp_path, start, lora={"r": 4, "alpha": 8, "dropout": 0.1}))
    assert f"train      8/8 updates, loss {record['loss'][-1]:.4f}, " in capfd.readouterr().err
    folder = Path(record["path"])
    assert not list(folder.glob("adapter*"))
    assert list(folder.glob("*.safetensors"))
    before, after = weights(start), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if "proj" in n}
    assert record["loss"][-1] < record["loss"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    stamp = (folder / "config.json").stat().st_mtime_ns
    again = rounds.train(config_for(tmp_path, start, lora={"r": 4, "alpha": 8, "dropout": 0.1}))
    assert again == record
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    other = rounds.train(config_for(tmp_path, start, lora={"r": 4, "alpha": 8, "dropout": 0.1}, learning_rate=1e-3))
    assert other["path"] != record["path"]
    assert other["steps"] == record["steps"]


def train_process(tmp_path, name, start, environment=None, **train):
    values = config_for(tmp_path, start, **train).model_dump(mode="json") | {"output": str(tmp_path / name)}
    (tmp_path / f"{name}.json").write_text(json.dumps(values))
    job = [sys.executable, str(ROOT / "jobs" / "train.py"), str(tmp_path / f"{name}.json")]
    return subprocess.Popen(
        job, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def newest_progress(folder):
    """Of the committed checkpoints; step 0 where there is none."""
    newest = {"step": 0, "loss": []}
    for file in folder.rglob("progress.json"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # old ones go, new ones are being copied
            newest = max(newest, json.loads(file.read_text()), key=lambda progress: progress["step"])
    return newest


def newest_step(folder):
    """Of the committed checkpoints; 0 where there is none."""
    return newest_progress(folder)["step"]


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
def test_everything_killed_goes_on_from_the_checkpoint_to_the_same_weights(tmp_path, start):
    """kill -9 of driver, raylet and two workers after a checkpoint, then of a worker alone; LoRA dropout on."""
    write_masked(tmp_path / "data", masked_rows(60))
    settings = {"num_workers": 2, "epochs": 8, "checkpoint_every_steps": 5, "learning_rate": 1e-3}
    settings["lora"] = {"r": 4, "alpha": 8, "dropout": 0.2}
    first = train_process(tmp_path, "killed", start, **settings)
    wait_for(lambda: newest_step(tmp_path / "killed") or first.poll() is not None, 120)
    assert first.poll() is None, first.communicate()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    subprocess.run(["pkill", "-9", "-g", str(first.pid)], check=False)
    assert not list((tmp_path / "killed").rglob("tokenclean.json"))
    step = newest_step(tmp_path / "killed")
    second = train_process(tmp_path, "killed", start, **settings)
    wait_for(lambda: newest_step(tmp_path / "killed") != step, 120)
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
    assert len(workers) >= 2
    workers[0].kill()
    out, err = second.communicate(timeout=300)
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
        self.controllers = weakref.WeakSet()

    def fit(self):
        assert not self.controllers, "the one before is still there, with all that its workers had"
        saved, controller = next(self.saved), Controller()
        self.controllers.add(controller)
        signal.signal(signal.SIGINT, lambda *_: controller)  # as Ray's own does
        if saved is None:
            return Result(metrics=None, checkpoint=None, error=None, path="", return_value={"a": 1})
        self.job.store.write_json(train._progress_file(self.job), {"saved": saved})
        error = copy.copy(self.error)  # which knows this frame, and this frame it
        raise error


class Controller:
    """Ray's, which ends when nothing holds it."""


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
        ([0, None], 1, ControllerError(RuntimeError("of Ray's own"))),
    ],
)
def test_training_whose_workers_die_goes_on_as_long_as_it_comes_further(tmp_path, start, saved, left, error, capfd):
    of = describe(start)
    job = job_for(Store(str(tmp_path)), "trained", [], "", of, config_for(tmp_path, start), of)
    trainer = Failing(job, saved, error)
    if left:
        with pytest.raises((UserError, ControllerError)):
            train._fit(trainer, job)
    else:
        assert train._fit(trainer, job) == {"a": 1}
        said = capfd.readouterr().err
        assert (
            len(re.findall(r"training goes on from its newest checkpoint \((RayActor|ActorUnavailable)Error: ", said))
            == len(saved) - 1
        )
    assert len(list(trainer.saved)) == left


@pytest.mark.faults
def test_a_night_on_nodes_that_die_often(tmp_path, start):
    """More often than training would be tried again without a checkpoint in between."""
    write_masked(tmp_path / "data", masked_rows(60))
    settings = {"num_workers": 3, "method": "full", "learning_rate": 1e-4, "epochs": 400, "checkpoint_every_steps": 20}
    with Cluster() as cluster:

        def come_further():
            assert job.poll() is None, job.communicate()
            now = {worker.pid for worker in cluster.processes("RayTrainWorker")}
            return len(now - before) == 3 and newest_step(tmp_path / "run") > step

        job, before, step = train_process(tmp_path, "run", start, cluster.environment, **settings), set(), 0
        for deaths in range(train.WORKER_FAILURES + 3):
            if deaths:
                before = {worker.pid for worker in cluster.processes("RayTrainWorker")}
                cluster.processes("raylet/raylet")[-1].kill()  # each node has a worker
                cluster.order("add")
            wait_for(come_further, 240)
            step = newest_step(tmp_path / "run")
        os.killpg(job.pid, signal.SIGKILL)  # its end is that of any training
        job.communicate()


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_a_diverging_run_ends_in_one_line_and_leaves_no_model(tmp_path, start):
    write_masked(tmp_path / "data", masked_rows(4), parts=1)
    with pytest.raises(UserError, match=r"lower train\.learning_rate") as error:
        rounds.train(config_for(tmp_path, start, learning_rate=1e30, method="full", epochs=4))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").rglob("tokenclean.json"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(np.arange(4, 9, dtype=np.int32), np.full(5, IGNORED, np.int32))], "no token to train on"),
        ([(np.array([5, 999], np.int32),) * 2], "another tokenizer"),
        ([(np.arange(4, 80, dtype=np.int32),) * 2], "positions for 64"),
    ],
)
def test_rows_that_cannot_train_the_model(tmp_path, start, rows, message):
    write_masked(tmp_path / "data", rows, parts=1)
    spec = replace(describe(start), position_limit=64)
    with pytest.raises(UserError, match=message):
        check_rows(MaskedRows((str(tmp_path / "data" / "part-0.parquet"),)), spec)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        ([[5, 6, 7], [8, 9]], [[-100, 6, 7], [9, -100]]),  # shifted
        ([[5, 6, 7], [8, 9]], [[-100, 6, 7], [8]]),
        ([[5, 6, 7], [8, 9]], [[-100, 6, 7], None]),
        ([[5, 6, 7], []], [[-100, 6, 7], []]),
    ],
)
def test_labels_that_are_not_the_row_s_own_tokens(tmp_path, ids, labels):
    pq.write_table(pa.table({"input_ids": ids, "labels": labels}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1: labels must be as many as input_ids"):
        MaskedRows((str(tmp_path / "a.parquet"),))


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    table = pa.table({"input_ids": [[1, 2]], "labels": [[-100, 2]]})
    for folder in ("run [1]", "run 1"):  # the second is what the first would match
        (tmp_path / folder).mkdir()
        pq.write_table(table.slice(0, folder == "run [1]"), tmp_path / folder / "a*b?.parquet")
    assert MaskedRows((str(tmp_path / "run [1]" / "a*b?.parquet"),)).lengths.tolist() == [2]


def test_files_without_the_columns(tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="rows of input_ids and labels"):
        MaskedRows((str(tmp_path / "a.parquet"),))


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_tied_embeddings_are_saved_once(tmp_path, tokenizer, method):
    start = save(tmp_path / "tied", make_llama(0, scale=2.0, tie_word_embeddings=True), tokenizer)
    rows = write_masked(tmp_path / "data", masked_rows())
    settings = {"method": method, "checkpoint_every_steps": 3, "lora": {"dropout": 0.0}}
    record = rounds.train(config_for(tmp_path, start, **settings))
    whole = Train(**{**SETTINGS, **settings, "data": "x"})
    loss_of = trainable(describe(start), whole, config_for(tmp_path, start).seed)
    curve = fit(loss_of, Rows.of(rows), whole)
    assert record["loss"] == pytest.approx(curve, abs=1e-3)
    saved = {name for file in (tmp_path / "run").rglob("*.safetensors") for name in load_file(file)}
    assert not any("lm_head" in name for name in saved)


def _join(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)


def _one_rank(rank, folder):
    _join(rank, folder)

    def work():
        if rank == 1:
            raise UserError("the disk of node 1 is full")

    with pytest.raises(UserError) as error:
        _together(work, 2)
    return str(error.value)


@pytest.mark.train
def test_what_ends_one_rank_ends_all(tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        said = list(pool.map(_one_rank, range(2), [tmp_path] * 2))
    assert said == ["the disk of node 1 is full"] * 2


def _prepared(rank, folder, job):
    _join(rank, folder)
    checked = []

    def check(model):
        checked.append(model)
        return TokenLoss(model, full_logits=True)

    how_it_is_trained.token_loss_for = check  # in this process alone
    _, loss_of = train._prepare(job, False, rank, 2)
    return len(checked), loss_of.full_logits


@pytest.mark.train
def test_one_rank_checks_the_model_for_all(tmp_path, start):
    """Of a model that is larger than half of a GPU all of a node's ranks would do so on its CPUs."""
    write_masked(tmp_path / "data", masked_rows(4), parts=1)
    of = describe(start)
    config = config_for(tmp_path, start)
    job = job_for(Store(str(tmp_path)), "trained", [str(tmp_path / "data" / "part-0.parquet")], "", of, config, of)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(_prepared, range(2), [tmp_path] * 2, [job] * 2))
    assert found == [(1, True), (0, True)]


CUT = "Training failed due to worker errors: (Ray cuts the middle out of long messages)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WorkerGroupError(CUT, {1: torch.OutOfMemoryError("CUDA out of memory. Tried")}), r"lower train\.batch_tokens"),
        (WorkerGroupError("NODE_OUT_OF_MEMORY: a worker was killed", {0: Exception()}), r"lower train\.batch_tokens"),
        (WorkerGroupError(CUT, {0: OSError(28, "No space left on device")}), "OSError: .*No space left.*; the same"),
        (WorkerGroupError(CUT, {0: RayActorError()}), "training workers keep dying .*; the same command goes on"),
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


def test_a_curve_goes_to_any_store_once(tmp_path, start, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)  # which TensorBoard's writer would use for s3://
    of, store = describe(start), Store("memory://curves")
    job = job_for(store, "trained", [], "", of, config_for(tmp_path, start, tensorboard=True), of)
    store.write_json(f"models/{job.name}/{TRAINED}", {"loss": [3.0, 2.0]})  # the driver died here
    for _ in range(2):
        assert fine_tune(job)["loss"] == [3.0, 2.0]
        assert len(store.names(f"tensorboard/{job.name}")) == 1


@pytest.mark.usefixtures("ray_session")
def test_more_workers_than_the_cluster_has(tmp_path, start):
    write_masked(tmp_path / "data", masked_rows(4), parts=1)
    with pytest.raises(UserError, match=r"train\.num_workers is 64, but the cluster has \d+ CPUs and no GPU"):
        rounds.train(config_for(tmp_path, start, num_workers=64))


@pytest.mark.parametrize("workers", ["auto", (1, 2)])
def test_nodes_of_a_label_want_a_number_of_workers(monkeypatch, workers):
    """Ray counts others too, and then waits for ever for as many with the label."""
    monkeypatch.setattr(train.ray, "cluster_resources", lambda: {"CPU": 4.0})
    settings = Train(num_workers=workers, label_selector={"kind": "strong"})
    with pytest.raises(UserError, match="count all nodes: with a label_selector give a number"):
        train._workers(settings, "cpu")
    settings = settings.model_copy(update={"num_workers": 2})
    assert train._workers(settings, "cpu") == (2, {"CPU": 1})


def test_what_is_no_masked_dataset_is_named(tmp_path, start):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="neither a finished run folder nor"):
        rounds.train(config_for(tmp_path, start))


def test_a_snapshot_of_another_tokenizer_or_with_a_lost_part_is_refused(tmp_path, start, tokenizer):
    store = Store(str(tmp_path / "data"))
    write_masked(tmp_path / "data" / "masked" / "v0001", masked_rows(6))
    store.write_json("masked/latest.json", {"snapshot": "v0001"})
    manifest = {
        "selection": "s",
        "parts": ["part-0", "part-1", "part-2"],
        "tokenizer": vocabulary_fingerprint(tokenizer),
    }
    store.write_json("masked/v0001/manifest.json", manifest | {"tokenizer": "other"})
    with pytest.raises(UserError, match="another tokenizer"):
        rounds.train(config_for(tmp_path, start))
    store.write_json("masked/v0001/manifest.json", manifest)
    (tmp_path / "data" / "masked" / "v0001" / "part-1.parquet").unlink()
    with pytest.raises(UserError, match="has lost part-1"):
        rounds.train(config_for(tmp_path, start))
