"""Ray Train with FSDP2 on gloo: the gradient, what a rank is told, the exported folder."""

import contextlib
import glob
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
import torch.distributed as dist
from conftest import ROOT, make_llama, save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean_ray import rounds, train
from tokenclean_ray import trainable as how_it_is_trained
from tokenclean_ray.config import Train
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import IGNORED, Rows, fit
from tokenclean_ray.layout import TRAINED, Store
from tokenclean_ray.models import describe, vocabulary_fingerprint
from tokenclean_ray.token_loss import TokenLoss
from tokenclean_ray.train import _together, fine_tune, job_for
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
    # by `glob`: Python 3.11's `rglob` fails where a folder goes that it has seen
    for file in glob.glob(f"{folder}/**/progress.json", recursive=True):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # old ones go, new ones are being copied
            newest = max(newest, json.loads(Path(file).read_text()), key=lambda progress: progress["step"])
    return newest


def newest_step(folder):
    """Of the committed checkpoints; 0 where there is none."""
    return newest_progress(folder)["step"]


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_a_diverging_run_ends_in_one_line_and_leaves_no_model(tmp_path, start):
    write_masked(tmp_path / "data", masked_rows(4), parts=1)
    with pytest.raises(UserError, match=r"lower train\.learning_rate") as error:
        rounds.train(config_for(tmp_path, start, learning_rate=1e30, method="full", epochs=4))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").rglob("tokenclean.json"))


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


def _join(rank, folder, ranks=2):
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks)


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


def _told(folder, job):
    _join(0, folder, ranks=1)
    told, context = [], SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    resources = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1})
    # in this process alone
    ray.get_gpu_ids, ray.get_runtime_context = list, lambda: resources
    ray.train.get_context, ray.train.get_checkpoint = lambda: context, lambda: None
    ray.train.report = lambda metrics, checkpoint: told.append(metrics["step"])
    Store.write_json = lambda store, path, value: told.append((value["step"], value["saved"]))
    train.export = lambda *_: None
    train._train(job)
    return told


@pytest.mark.train
def test_what_is_saved_is_told_at_once(tmp_path, start):
    """By it trainings that come further are told from those that fail again and again."""
    write_masked(tmp_path / "data", masked_rows(16), parts=1)
    of, config = describe(start), config_for(tmp_path, start, checkpoint_every_steps=2)
    job = job_for(Store(str(tmp_path)), "trained", [str(tmp_path / "data" / "part-0.parquet")], "", of, config, of)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        told = pool.submit(_told, tmp_path, job).result()
    assert [one for one in told if one != (3, 2)] == [(1, 0), 2, (2, 2), 4, (4, 4)]  # 3: of a machine that is slow


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
