"""Jobs on GPUs; where there is none, what is asked of them, as far as it shows: Ray counts some that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_llama, save, write_rows
from test_rounds import some_rows

from tokenclean_ray import models, score_actors
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.models import describe
from tokenclean_ray.score import PartScorer

JOB = """
import sys, ray
from tokenclean_ray.cli import main
ray.init("local", num_cpus=2, num_gpus=2, logging_level="ERROR", log_to_driver=False)
sys.exit(main(sys.argv[1:]))
"""


def job(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "tokenclean_ray", *arguments],
        cwd=folder, env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(*jobs):
    for one in jobs:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors


def parts(folder, column):
    files = sorted(Path(folder).rglob("*.parquet"))
    tables = [pq.read_table(file).sort_by("row") for file in files]
    return np.concatenate([np.concatenate(table[column].to_pylist()) for table in tables])


@pytest.mark.gpu
def test_a_gpu_scores_and_trains_as_the_cpu_does(tmp_path, model_pair):
    """In float32 to rounding; in half precision near it."""
    write_rows(tmp_path / "data.jsonl", some_rows(300))
    (tmp_path / "run.yaml").write_text(
        f"data: {{path: data.jsonl}}\nmodel: {{base: {model_pair[0]}, reference: {model_pair[1]}}}\n"
        "train: {batch_rows: 50, num_workers: 1, lora: {r: 4, dropout: 0.0}}\n"
    )
    places = {"cpu": ("cpu", "float32"), "gpu": ("gpu", "float32"), "half": ("gpu", "auto")}
    for step in ("clean", "train"):
        ended(*(
            job(tmp_path, step, "run.yaml", f"output={name}", f"model.device={device}", f"model.dtype={dtype}",
                f"train.data={name}/masked/v0001")
            for name, (device, dtype) in places.items()
        ))  # fmt: skip
    folders = {name: sorted((tmp_path / name / "losses").iterdir()) for name in places}
    for of in range(2):  # base and reference
        losses = {name: parts(folders[name][of], "loss") for name in places}
        np.testing.assert_allclose(losses["gpu"], losses["cpu"], atol=1e-3)
        assert 0 < np.abs(losses["half"] - losses["cpu"]).mean() < 0.05
    labels = {name: parts(tmp_path / name / "masked", "labels") for name in places}
    assert (labels["gpu"] != labels["cpu"]).mean() < 0.001
    assert (labels["half"] != labels["cpu"]).mean() < 0.05
    curves = {
        name: np.array(json.loads(next((tmp_path / name / "models").glob("*/tokenclean.json")).read_text())["loss"])
        for name in places
    }
    np.testing.assert_allclose(curves["gpu"], curves["cpu"], atol=0.01)  # of labels that are nearly the same
    assert np.abs(curves["half"] - curves["cpu"]).mean() < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs that Ray counts here must not be there")
@pytest.mark.parametrize(
    ("command", "gpus"), [("clean", 1), ("clean", 2), pytest.param("train", 1, marks=pytest.mark.train)]
)
def test_actors_that_ask_for_gpus_start(tmp_path, model_pair, command, gpus):
    """And say that torch sees none; of training before any of them gets to its work."""
    table = pa.table({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]})
    (tmp_path / "masked").mkdir()
    pq.write_table(table, tmp_path / "masked" / "part.parquet")
    write_rows(tmp_path / "data.jsonl", some_rows(20))
    (tmp_path / "run.yaml").write_text(
        f"output: run\ndata: {{path: data.jsonl}}\nmodel: {{base: {model_pair[0]}, reference: {model_pair[1]}}}\n"
        f"score: {{gpus_per_actor: {gpus}}}\ntrain: {{data: masked}}\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    job = [sys.executable, "-c", JOB, command, "run.yaml"]
    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 2, done.stderr
    assert "model.device: Ray counts GPUs on a node where torch sees none: install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("wanted", "actors"), [(1, 10), (3, 2), (4, 2), (8, 1)])
def test_an_actor_s_gpus_are_on_one_node(monkeypatch, wanted, actors):
    nodes = [{"Alive": alive, "Resources": {"CPU": 4.0, "GPU": gpus}} for gpus, alive in ((8.0, True), (2.0, True))]
    nodes += [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    nodes = [node | {"Labels": {}} for node in nodes]
    monkeypatch.setattr(score_actors.ray, "nodes", lambda: nodes)
    assert score_actors.pool_size(Score(gpus_per_actor=wanted), True, 1000, 0) == (actors, actors)
    with pytest.raises(UserError, match=r"of 9 GPUs .*score\.gpus_per_actor\) no node has more than 8"):
        score_actors.pool_size(Score(gpus_per_actor=9), True, 1000, 0)


def test_memory_that_is_out_while_models_load(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spec = describe(save(tmp_path / "model", make_llama()))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match=r"no memory to load into: set score\.colocate: false"):
        PartScorer(Store("memory://unused"), [(spec, "losses/x")], "float32", Score(), gpu=False)
