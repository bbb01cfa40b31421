"""Estimates against what a run then really did, and operations against torch's own counter."""

import numpy as np
import pytest
import torch
from conftest import make_llama, save, write_rows
from test_rounds import config_for, some_rows
from test_token_loss import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig, MistralForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenclean_ray import cli, estimate, rounds, sampling
from tokenclean_ray.config_file import build_config
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


@pytest.mark.parametrize(
    ("kind", "experts", "asked"),
    [
        ("mixtral", {"num_local_experts": 8}, "num_experts_per_tok"),
        ("ernie4_5_moe", {"moe_num_experts": 8, "moe_num_shared_experts": 0, "moe_layer_start_index": 0}, "moe_k"),
        ("dots1", {"n_routed_experts": 8, "n_shared_experts": 0, "first_k_dense_replace": 0}, "num_experts_per_tok"),
    ],
)
def test_experts_count_by_their_share(tmp_path, kind, experts, asked):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}  # fmt: skip
    found = {}
    for active in (2, 4):
        path = tmp_path / str(active)
        config = CONFIG_MAPPING[kind](**sizes, **experts, **{asked: active})
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        found[active] = estimate.model_size(str(path)).per_token
    expert = 3 * 32 * 64
    assert found[4] - found[2] == 2 * 2 * 2 * expert  # two operations, two experts more, two layers
    assert found[2] == pytest.approx(2 * 2 * (4 * 32 * 32 + 8 * 32 + 2 * expert), rel=1e-3)  # Ernie has a table of 8


def test_what_reads_images_costs_nothing(tmp_path):
    """Only text goes through the model."""
    model = build("mistral3_with_images")
    whole = estimate.model_size(save(tmp_path / "whole", model))
    text = MistralForCausalLM(model.config.text_config)
    assert whole == estimate.model_size(save(tmp_path / "text", text))


def test_a_model_without_attention(tmp_path):
    config = MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=8, time_step_rank=4)
    assert estimate.model_size(save(tmp_path / "mamba", AutoModelForCausalLM.from_config(config))).per_pair == 0


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
    folders = ["encoded", "masked/v0001", *(f"losses/{name}" for name in store.names("losses"))]
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
    for seed in range(60):
        found = estimate.estimate(config.model_copy(update={"seed": seed}))
        assert not found.complete
        inside.append(
            [abs(found.counts[n].value - truth.counts[n].value) <= found.counts[n].error for n in ("rows", "tokens")]
        )
    assert (np.mean(inside, axis=0) > 0.9).all()


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
