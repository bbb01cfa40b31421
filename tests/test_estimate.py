"""Estimates against what a run then really did, and operations against torch's own counter."""

import re

import numpy as np
import pytest
import torch
from conftest import chat, make_llama, save, write_rows
from test_rounds import config_for, some_rows
from test_token_loss import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig, MistralForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenclean_ray import cli, estimate, rounds, sampling
from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.run import open_run


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


@pytest.mark.parametrize(("on_overflow", "told"), [("truncate", True), ("reject", False)])
def test_rows_that_are_cut_are_told_of(tmp_path, model_pair, capsys, on_overflow, told):
    long = chat("the quick brown fox", "the lazy dog " * 100)
    settings = {"max_length": 100, "on_overflow": on_overflow}
    config = config_for(tmp_path, model_pair, [*some_rows(17), long, long, long], data=settings)
    estimate.show(estimate.estimate(config), "h100")
    line = "\n3 of 20 rows reach data.max_length = 100, where longer ones are cut\n"
    assert (line in capsys.readouterr().out) == told


def test_rejected_rows_are_told_of(tmp_path, model_pair, capsys):
    of_a_bot = {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "[a]"}]}
    config = config_for(tmp_path, model_pair, [*some_rows(19), of_a_bot])
    estimate.show(estimate.estimate(config), "h100")
    assert "\nrejected 1 of 20 rows read; 1: unknown role – 'bot' in turn 2\n" in capsys.readouterr().out
    config = config_for(tmp_path, model_pair, [*some_rows(18), of_a_bot, of_a_bot])
    estimate.show(estimate.estimate(config), "h100")
    assert "'bot' in turn 2; more than data.max_rejected = 0.05, at which clean stops\n" in capsys.readouterr().out
    config = config_for(tmp_path, model_pair, [of_a_bot])
    with pytest.raises(UserError, match=r"none of 1 sampled rows can be used; 1: unknown role – 'bot' in turn 2$"):
        estimate.estimate(config)


def test_turns_by_other_keys(tmp_path, model_pair):
    rows = [{"messages": [{"role": role, "text": "the fox"} for role in ("user", "assistant")]}]
    config = config_for(tmp_path, model_pair, rows, data={"turn_keys": {"content": "text"}})
    assert estimate.estimate(config).counts["rejected"].value == 0


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
    names = ("rows", "tokens", "answer tokens", "FLOPs")
    value, error = [], []
    for seed in range(60):
        found = estimate.estimate(config.model_copy(update={"seed": seed}))
        assert not found.complete
        value.append([found.counts[name].value for name in names])
        error.append([found.counts[name].error for name in names])
    away = np.array(value) - [truth.counts[name].value for name in names]
    assert (np.mean(abs(away) <= error, axis=0) > 0.9).all()
    assert (np.mean(error, axis=0) < 2 * 1.96 * away.std(axis=0)).all()  # nor is it much wider


def test_two_compressed_files_tell_less_than_many_chunks():
    """Student's t of one degree, 12.71, by hand: 10 and 20 to a byte, a mean of 15 ± 5."""
    chunks = [sampling.Chunk([], 1), sampling.Chunk([], 1)]
    (found, *_) = estimate.totals(sampling.Sample(chunks, 4, False), [np.full(5, 10.0), np.full(5, 20.0)]).values()
    assert (found.value, found.error) == (60, pytest.approx(4 * 5 * 12.71))


def estimate_with(config, monkeypatch, chunk_bytes):
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "CHUNK_BYTES", chunk_bytes)
        return estimate.estimate(config)


def test_scoring_is_a_pass_of_two_models_over_the_rows(tmp_path, model_pair, tokenizer):
    rows = some_rows(30)
    found = estimate.estimate(config_for(tmp_path, model_pair, rows))
    size, expected = estimate.model_size(model_pair[0]), 0.0
    for _, mask in build_encoder(tokenizer, "auto", 2048, "truncate").encode_rows(rows, "auto", {}):
        for t, answer in enumerate(mask):
            expected += size.per_token + size.per_answer_token * bool(answer)
            expected += size.per_pair * (2 * t + 1)  # of the square so far, what this token adds
    assert found.scoring_flops.value == pytest.approx(2 * expected)


def with_warmup(tmp_path, model_pair, warmup, select=None, **train):
    """A config whose reference is trained first, for three epochs."""
    write_rows(tmp_path / "warm.jsonl", warmup)
    values = config_for(tmp_path, model_pair, some_rows(30)).model_dump(mode="json")
    values["data"]["warmup"] = str(tmp_path / "warm.jsonl")
    values["model"]["reference"] = None
    values["train"] |= {"epochs": 3, **train}
    values["select"] |= select or {}
    return build_config(values)


@pytest.mark.parametrize(
    ("method", "checkpointing", "passes"),
    [("lora", False, 2), ("lora", True, 3), ("full", False, 3), ("full", True, 4)],
)
def test_a_reference_that_is_trained_first_costs_too(tmp_path, model_pair, tokenizer, method, checkpointing, passes):
    """Forward, back to the activations, to the weights where they are trained; forward again with checkpoints."""
    train = {"method": method, "activation_checkpointing": checkpointing}
    found = estimate.estimate(with_warmup(tmp_path, model_pair, some_rows(30), **train))
    once, size = found.scoring_flops.value / 2, estimate.model_size(model_pair[0])
    encoder = build_encoder(tokenizer, "auto", 2048, "truncate")
    attention = size.per_pair * sum(len(ids) ** 2 for ids, _ in encoder.encode_rows(some_rows(30), "auto", {}))
    weights = passes * (once - attention)
    assert found.training_flops.value == pytest.approx(3 * (weights + (3 + checkpointing) * attention))


@pytest.mark.parametrize(("method", "passes"), [("lora", 2), ("full", 3)])
def test_training_against_torch_s_counter(tmp_path, method, passes):
    """A step's operations: attention's are three times the forward's, whether weights or adapters are trained."""
    model, length = make_llama(num_key_value_heads=2), 256
    size = estimate.model_size(save(tmp_path / "model", model))
    model.set_attn_implementation("eager")
    if method == "lora":
        for parameter in model.parameters():
            parameter.requires_grad = parameter is model.get_input_embeddings().weight  # what adapters cost apart
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False).logits.sum().backward()
    weights, pairs = (size.per_token + size.per_answer_token) * length, 2 * size.per_pair * length**2
    assert counter.get_total_flops() == pytest.approx(passes * weights + 3 * pairs, rel=1e-6)


@pytest.mark.usefixtures("ray_session")
def test_rows_that_gate_auto_holds_back_are_not_trained_on(tmp_path, model_pair):
    """Against the split of a real run; of other held-out rows all of the warm-up set is trained on."""
    auto = {"scorer": "gated_excess_loss", "gate": "auto"}
    config = with_warmup(tmp_path, model_pair, some_rows(300, seed=1), select=auto)
    every = estimate.estimate(with_warmup(tmp_path, model_pair, some_rows(300, seed=1))).training_flops
    found = estimate.estimate(config).training_flops
    with open_run(config, "clean") as run:
        warm, held = rounds._warmup_rows(run, hold_out=True)
    trained, left = (sum(summary["tokens"] for summary in rows.values()) for rows in (warm, held))
    assert abs(found.value / every.value - trained / (trained + left)) < found.error / every.value
    assert not found.exact
    assert found.error < 0.05 * found.value
    assert every.exact
    held_out = config.data.model_copy(update={"held_out": config.data.warmup})
    assert estimate.estimate(config.model_copy(update={"data": held_out})).training_flops == every


def test_training_has_the_error_of_the_rows_that_it_reads(tmp_path, model_pair, monkeypatch):
    """Of a sample of the warm-up file, though the pool is read whole."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(sampling, "NUM_CHUNKS", 16)
    config = with_warmup(tmp_path, model_pair, some_rows(600), method="full", activation_checkpointing=False)
    found = estimate.estimate(config)
    warmup = config.data.model_copy(update={"path": config.data.warmup})
    once = estimate.estimate(config.model_copy(update={"data": warmup})).counts["FLOPs"]
    assert found.complete
    assert found.scoring_flops.exact
    assert not once.exact
    assert once.error > 0
    assert (found.training_flops.value, found.training_flops.error) == (9 * once.value, 9 * once.error)


BY_HAND = {
    name: estimate.Total(value, value * error, False)
    for name, value, error in (("rows", 1000, 0.01), ("rejected", 0, 0), ("tokens", 5000, 0.02),
                               ("answer tokens", 2000, 0.03))
}  # fmt: skip


def by_hand(training, complete=False):
    scoring = estimate.Total(3e18, 3e15, complete)
    return estimate.Estimate(BY_HAND, 2, scoring, training, 3e6, 100, complete)


def test_hours_at_the_assumed_shares_of_a_gpu_s_peak():
    """4.45e18 operations are 1.25 hours of 989 TFLOP/s."""
    found = by_hand(estimate.Total(989e12 * 4500 - 3e18, 0.0, True))
    assert found.gpu_hours("h100") == pytest.approx((1.25 / 0.55, 1.25 / 0.4, 1.25 / 0.25))


@pytest.mark.parametrize(
    ("training", "complete", "expected"),
    [
        (estimate.Total(1e18, 4e16, False), False, ("about", "0.1%", "4.0%")),
        (estimate.Total(1e18, 0.0, True), False, ("about", "0.1%", "exact")),
        (estimate.Total(1e18, 4e16, False), True, ("exact", "exact", "4.0%")),
        (estimate.Total(1e18, np.inf, False), True, ("exact", "exact", "unknown")),
    ],
)
def test_each_figure_is_printed_with_its_own_error(capsys, training, complete, expected):
    estimate.show(by_hand(training, complete), "h100")
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    shown = {name: rest for name, *rest in lines}
    assert shown["tokens"] == ["5,000", "2.0%"]
    assert shown["answer tokens"] == ["2,000", "3.0%"]
    assert shown["rejected"] == ["0", "none seen"]
    share, scoring, trained = expected
    assert shown["response share"] == ["40.0%", share]
    assert shown["scoring FLOPs, 2 models"] == ["3e+18", scoring]
    assert shown["training FLOPs, reference"] == ["1e+18", trained]
    assert shown["disk: rows, losses, masks"] == ["3 MB", "about"]


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
