"""What is asked of GPUs, as far as it shows without one: Ray counts some here that are not there."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import make_llama, save, write_rows
from test_rounds import some_rows

from tokenclean_ray import models, pipeline
from tokenclean_ray.config import Score, UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.models import describe
from tokenclean_ray.score import PartScorer

JOB = """
import sys, ray
from tokenclean_ray.cli import main
ray.init("local", num_cpus=2, num_gpus=2, logging_level="ERROR", log_to_driver=False)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs that Ray counts here must not be there")
@pytest.mark.parametrize("gpus", [1, 2])
def test_actors_that_ask_for_gpus_start(tmp_path, model_pair, gpus):
    """And say that torch sees none."""
    write_rows(tmp_path / "data.jsonl", some_rows(20))
    (tmp_path / "run.yaml").write_text(
        f"output: run\ndata: {{path: data.jsonl}}\nmodel: {{base: {model_pair[0]}, reference: {model_pair[1]}}}\n"
        f"score: {{gpus_per_actor: {gpus}}}\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    job = [sys.executable, "-c", JOB, "clean", "run.yaml"]
    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "model.device: Ray counts GPUs on a node where torch sees none: install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("wanted", "actors"), [(1, 10), (3, 2), (4, 2), (8, 1)])
def test_an_actor_s_gpus_are_on_one_node(monkeypatch, wanted, actors):
    nodes = [{"Alive": alive, "Resources": {"CPU": 4.0, "GPU": gpus}} for gpus, alive in ((8.0, True), (2.0, True))]
    nodes += [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(pipeline.ray, "nodes", lambda: nodes)
    assert pipeline.pool_size(Score(gpus_per_actor=wanted), True, 1000, 0) == (actors, actors)
    with pytest.raises(UserError, match=r"of 9 GPUs .*score\.gpus_per_actor\) no node has more than 8"):
        pipeline.pool_size(Score(gpus_per_actor=9), True, 1000, 0)


def test_memory_that_is_out_while_models_load(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spec = describe(save(tmp_path / "model", make_llama()))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match=r"no memory to load into: set score\.colocate: false"):
        PartScorer(Store("memory://unused"), [(spec, "losses/x")], "float32", Score(), gpu=False)
