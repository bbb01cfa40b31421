"""Estimates against what a run then really did, and operations against torch's own counter."""

import numpy as np
import pytest
import torch
from conftest import make_llama, save, write_rows
from test_rounds import config_for, some_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from tokenclean_ray import cli, estimate, rounds, sampling
from tokenclean_ray.config import build_config
from tokenclean_ray.layout import Store


@pytest.mark.parametrize("length", [16, 64])
def test_operations_against_torch_s_counter(tmp_path, length):
    model = make_llama(num_key_value_heads=2)
    path = save(tmp_path / "model", model)
    model.set_attn_implementation("eager")  # of fused kernels on a CPU it counts nothing
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    size = estimate.model_size(path)
    # it counts the whole square of attention, and the head at every position
    whole = size.per_token * length + 2 * size.per_pair * length**2 + size.per_answer_token * length
    assert counter.get_total_flops() == pytest.approx(whole, rel=1e-6)


def test_experts_count_by_their_share(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 100, "num_local_experts": 8}  # fmt: skip
    found = {}
    for active in (2, 4):
        path = tmp_path / str(active)
        MixtralForCausalLM(MixtralConfig(**sizes, num_experts_per_tok=active)).save_pretrained(path)
        found[active] = estimate.model_size(str(path)).per_token
    expert = 3 * 32 * 64
    assert found[4] - found[2] == 2 * 2 * 2 * expert  # two operations, two experts more, two layers
    assert found[2] == 2 * 2 * (4 * 32 * 32 + 8 * 32 + 2 * expert)


@pytest.mark.usefixtures("ray_session")
def test_a_small_run_is_estimated_to_the_token(tmp_path, model_pair):
    rows = [*some_rows(60), {"messages": []}]
    config = config_for(tmp_path, model_pair, rows, data={"max_rejected": 0.5})
    found = estimate.estimate(config)
    counts = rounds.clean(config)["counts"]
    assert found.complete
    for name, key in (
        ("rows", "rows"),
        ("rejected", "rejected"),
        ("tokens", "tokens"),
        ("answer tokens", "response_tokens"),
    ):
        assert (found.counts[name].value, found.counts[name].error) == (counts[key], 0)
    store = Store(config.output)
    folders = ["encoded", "masked/v0001", *(f"losses/{name}" for name in store.folders("losses"))]
    written = sum(store.size(f"{f}/{part}.parquet") for f in folders for part in store.part_names(f))
    assert 0.3 < found.disk / written < 1.2  # many small parts, each with a footer


def test_a_large_one_within_its_error(tmp_path, model_pair, monkeypatch):
    """Over seeds the truth lies in the 95 % interval about as often as it says."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(sampling, "NUM_CHUNKS", 16)
    rows = some_rows(1500)
    config = config_for(tmp_path, model_pair, rows)
    truth = estimate_with(config, monkeypatch, 1 << 24)
    inside = []
    for seed in range(40):
        found = estimate.estimate(config.model_copy(update={"seed": seed}))
        assert not found.complete
        inside.append(
            [abs(found.counts[n].value - truth.counts[n].value) <= found.counts[n].error for n in ("rows", "tokens")]
        )
    assert (np.mean(inside, axis=0) > 0.8).all()


def estimate_with(config, monkeypatch, chunk_bytes):
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "CHUNK_BYTES", chunk_bytes)
        return estimate.estimate(config)


def test_a_reference_that_is_trained_first_costs_too(tmp_path, model_pair):
    write_rows(tmp_path / "warm.jsonl", some_rows(30))
    values = config_for(tmp_path, model_pair, some_rows(30)).model_dump(mode="json")
    values["data"]["warmup"] = str(tmp_path / "warm.jsonl")
    values["model"]["reference"] = None
    values["train"] |= {"epochs": 3, "activation_checkpointing": False, "method": "full"}
    found = estimate.estimate(build_config(values))
    assert found.training_flops == pytest.approx(3 * 3 * found.scoring_flops / 2)


def test_the_command_prints_it(tmp_path, model_pair, monkeypatch, capsys):
    config = config_for(tmp_path, model_pair, some_rows(30))
    (tmp_path / "run.yaml").write_text(config.model_dump_json())
    assert cli.main(["estimate", str(tmp_path / "run.yaml"), "--gpu", "a100"]) == 0
    text = capsys.readouterr().out
    for shown in ("rows", "response share", "scoring FLOPs", "GPU-hours on a100", "disk", "312 TFLOP/s", "40%"):
        assert shown in text
    assert not (tmp_path / "run").exists()


def test_the_command_knows_every_gpu():
    assert tuple(estimate.GPUS) == cli.GPUS
