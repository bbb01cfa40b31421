"""Token losses of many architectures against each row alone through the model's own logits."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Pix2StructConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenclean_ray import schema
from tokenclean_ray.batching import rope_groups
from tokenclean_ray.errors import UserError
from tokenclean_ray.kernels import fuse_norms
from tokenclean_ray.models import attention_for, class_for, load_model
from tokenclean_ray.score import score_statistics, score_table
from tokenclean_ray.token_loss import TokenLoss, token_loss_for

VOCAB = 120
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
    },
    "original_max_position_embeddings": 40,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 40,
}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_dynamic": ("llama", DYNAMIC),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "gemma2": ("gemma2", {"sliding_window": 16, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"head_dim": None}),
    "phi3_longrope": ("phi3", {"head_dim": None, **LONGROPE}),
    "phi_head_bias": ("phi", {"head_dim": None}),
    "gpt_neox": ("gpt_neox", {"head_dim": None}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "cohere_scale": ("cohere", {"logit_scale": 0.25}),
    "granite_scaling": ("granite", {"logits_scaling": 3.0}),
    "llama4": ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 48}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "jetmoe": ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}),
    "mistral3_with_images": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **COMMON},
            "vision_config": {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "head_dim": 8,
                              "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    ),
}  # fmt: skip


MORE_THAN_A_HEAD = {"modernbert": ("modernbert-decoder", {"local_attention": 16})}  # which takes full logits


def build(name):
    kind, own = (ARCHITECTURES | MORE_THAN_A_HEAD)[name]
    settings = {k: v for k, v in {**COMMON, **own}.items() if v is not None}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**settings)
    model = class_for(config).from_config(config, attn_implementation=attention_for(config)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # sharp predictions: an off-by-one would show
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif "bias" in kind:
                parameter.normal_(0, 1)
    return model


def rows(seed=0, lengths=(3, 9, 17, 18, 39, 40, 41, 57, 57, 64)):
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, VOCAB, n).astype(np.int32) for n in lengths]
    masks = [generator.random(n) < 0.6 for n in lengths]
    for mask in masks:
        mask[0] = False
        mask[-1] = True
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return ids, masks, np.concatenate(ids), np.concatenate(masks), offsets


def alone(model, ids, mask):
    """The oracle: one row, full logits, a loop over its tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0].double()
    expected = np.zeros(len(ids))
    for t in range(1, len(ids)):
        if mask[t]:
            expected[t] = -torch.log_softmax(logits[t - 1], 0)[ids[t]].item()
    return expected


def score_rows(*arguments, **more):
    """Losses alone."""
    return score_statistics(*arguments, **more)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_equal_each_row_alone(name):
    model = build(name)
    loss_of = token_loss_for(model)
    assert not loss_of.full_logits
    ids, masks, flat, mask, offsets = rows()
    order = np.random.default_rng(1).permutation(len(ids))  # whatever ran before must not matter
    found = score_rows(loss_of, flat, mask, offsets, batch_tokens=150)
    for row in order:
        expected = alone(build(name) if "dynamic" in name else model, ids[row], masks[row])
        np.testing.assert_allclose(found[offsets[row] : offsets[row + 1]], expected, atol=2e-4)
    assert (found[~mask] == 0).all()
    again = score_rows(loss_of, flat, mask, offsets, batch_tokens=150)
    assert again.tobytes() == found.tobytes()


def test_capped_attention_is_not_left_out(tmp_path):
    """A loaded Gemma 2 against eager attention; the sdpa of transformers 5.19 drops the cap without a word."""
    model = build("gemma2")
    model.config.attn_logit_softcapping = 0.5  # low enough to matter in a tiny model
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.float32, "cpu")
    ids, masks, flat, mask, offsets = rows()
    found = score_rows(token_loss_for(loaded), flat, mask, offsets, batch_tokens=150)
    span = slice(offsets[8], offsets[9])
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    np.testing.assert_allclose(found[span], alone(eager, ids[8], masks[8]), atol=2e-4)
    uncapped = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", attn_logit_softcapping=None
    ).eval()
    assert np.abs(found[span] - alone(uncapped, ids[8], masks[8])).max() > 1e-3


def test_full_logits_are_the_way_out_where_the_head_is_not_all():
    model = build("llama")
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)
    loss_of = token_loss_for(model)
    assert loss_of.full_logits
    ids, masks, flat, mask, offsets = rows()
    found = score_rows(loss_of, flat, mask, offsets, batch_tokens=150)
    np.testing.assert_allclose(found[offsets[4] : offsets[5]], alone(model, ids[4], masks[4]), atol=2e-4)


def test_an_adapter_of_the_head_is_not_left_out_by_half_precision():
    base = build("llama").to(torch.bfloat16)
    base.set_attn_implementation("eager")
    settings = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(base, settings, autocast_adapter_dtype=False)
    loss_of = token_loss_for(model.get_base_model())
    ids, masks, flat, mask, offsets = rows()
    found = score_rows(loss_of, flat, mask, offsets, batch_tokens=1)
    np.testing.assert_allclose(found[offsets[4] : offsets[5]], alone(model, ids[4], masks[4]), atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_refuses_no_model_and_takes_no_head_away(name):
    """In bfloat16 a batch of another shape rounds otherwise, and an expert may flip."""
    model = build(name).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    assert not token_loss_for(model).full_logits
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)
    assert token_loss_for(model).full_logits


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "phi_head_bias", "granite_scaling", "cohere_scale"])
def test_gradients_are_those_of_the_full_softmax(name, frozen, monkeypatch):
    """Of any weighting of the losses, under a head that is trained or not."""
    monkeypatch.setattr("tokenclean_ray.token_loss.CPU_CHUNK_LOGITS", VOCAB * 7)  # many chunks
    monkeypatch.setattr("tokenclean_ray.token_loss.LEAST_CHUNK", 1)
    model = build(name)
    model.get_output_embeddings().requires_grad_(not frozen)
    ids_BT = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    target_BT = ids_BT % 3 > 0
    target_BT[:, 0] = False
    weights_N = torch.randn(int(target_BT.sum()), generator=torch.Generator().manual_seed(1))
    gradients = []
    for losses_N in (
        TokenLoss(model)(ids_BT, target_BT),
        torch.nn.functional.cross_entropy(
            model(input_ids=ids_BT, use_cache=False).logits[:, :-1][target_BT[:, 1:]],
            ids_BT[target_BT],
            reduction="none",
        ),
    ):
        model.zero_grad()
        (losses_N * weights_N).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    found, expected = gradients
    assert len(found) == len(expected)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi_head_bias", "granite_scaling", "full_logits"])
def test_entropies_and_ranks_equal_those_of_the_full_softmax(name, monkeypatch):
    model = build("llama" if name == "full_logits" else name)
    loss_of = TokenLoss(model, full_logits=True) if name == "full_logits" else token_loss_for(model)
    monkeypatch.setattr("tokenclean_ray.token_loss.CPU_CHUNK_LOGITS", VOCAB * 7)  # many chunks
    monkeypatch.setattr("tokenclean_ray.token_loss.LEAST_CHUNK", 1)
    ids, masks, flat, mask, offsets = rows()
    more = ("entropy", "rank")
    losses, entropies, ranks = score_statistics(loss_of, flat, mask, offsets, 150, more)
    for row, (own, response) in enumerate(zip(ids, masks, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(own[None].astype(np.int64)), use_cache=False).logits[0].double()
        p = torch.softmax(logits, -1).numpy()
        expected = [-(p[t - 1] * np.log(p[t - 1])).sum() if response[t] else 0 for t in range(len(own))]
        here = slice(offsets[row], offsets[row + 1])
        np.testing.assert_allclose(entropies[here], expected, atol=2e-4)
        # float64 orders tokens that float32 takes for equal; so many of them lie within 1e-4 of the label's
        label = logits.numpy()[np.arange(-1, len(own) - 1), own][:, None]
        above = [(np.roll(logits.numpy(), 1, 0) > label + margin).sum(1) * response for margin in (1e-4, -1e-4)]
        assert ((above[0] <= ranks[here]) & (ranks[here] <= above[1])).all()
    assert entropies[mask].std() > 0.01
    assert len(np.unique(ranks[mask])) > 10
    for number, name in enumerate(more, 1):  # asked for alone it is the same
        alone = score_statistics(loss_of, flat, mask, offsets, 150, (name,))
        assert alone[1].tobytes() == (losses, entropies, ranks)[number].tobytes()
    assert losses.tobytes() == score_rows(loss_of, flat, mask, offsets, batch_tokens=150).tobytes()


def test_a_token_that_cannot_be_adds_nothing_to_the_entropy():
    loss_of = TokenLoss(build("phi_head_bias"))
    with torch.no_grad():
        loss_of.model.get_output_embeddings().bias[5:9] = -torch.inf
    ids_BT = torch.tensor([[10, 11, 12]])
    _, entropy_N = loss_of.statistics(ids_BT, torch.tensor([[False, True, True]]), ("entropy",)).detach()
    with torch.no_grad():
        logits_NV = loss_of.model(input_ids=ids_BT, use_cache=False).logits[0, :2]
    possible = torch.cat([logits_NV[:, :5], logits_NV[:, 9:]], 1)
    torch.testing.assert_close(entropy_N, torch.distributions.Categorical(logits=possible).entropy())


def test_a_rank_among_logits_that_are_no_numbers_is_none():
    model = build("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    ids_BT = torch.randint(6, VOCAB, (2, 9))
    target_BT = torch.arange(9).expand(2, 9) > 3
    with torch.inference_mode():
        assert TokenLoss(model).statistics(ids_BT, target_BT, ("rank",)).isnan().all()


@pytest.mark.parametrize("more", [(), ("entropy",), ("rank",), ("entropy", "rank")])
def test_tables_have_what_was_asked_for(more):
    _, _, flat, mask, offsets = rows()
    lists = [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values)) for values in (flat, mask)]
    encoded = pa.table({"row": pa.array(range(len(offsets) - 1), pa.int32()), "input_ids": lists[0],
                        "response_mask": lists[1]})  # fmt: skip
    loss_of = token_loss_for(build("llama"))
    plain, table = (score_table(loss_of, encoded, 150, of, "here")[0] for of in ((), more))
    assert table.schema == schema.losses(more)
    assert table.select(plain.column_names).equals(plain)
    for name in more:
        assert (pc.list_value_length(table[name]).to_numpy() == np.diff(offsets)).all()
    assert schema.statistics_of("losses/some-rank-model-float32" + schema.statistics_suffix(more)) == more


def test_a_model_that_wants_an_image_is_refused():
    sizes = {"hidden_size": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
    config = Pix2StructConfig(text_config=sizes, vision_config=sizes | {"num_hidden_layers": 1, "seq_len": 16})
    with pytest.raises(UserError, match=r"Pix2StructForCond.* takes no text alone \(You have to specify .*patches\)"):
        token_loss_for(class_for(config).from_config(config))


def test_a_model_that_padding_changes_is_refused():
    model = build("llama")
    body = model.base_model

    def leak(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.cumsum(1).flip(1)
        return output

    body.register_forward_hook(leak)
    with pytest.raises(UserError, match="cannot be scored in batches"):
        token_loss_for(model)


def test_the_head_sees_no_more_than_a_chunk_of_positions(monkeypatch):
    model = build("llama")
    loss_of = token_loss_for(model)
    _, _, flat, mask, offsets = rows()
    whole = score_rows(loss_of, flat, mask, offsets, batch_tokens=1000)
    seen = []
    inner = TokenLoss._logits
    monkeypatch.setattr("tokenclean_ray.token_loss.CPU_CHUNK_LOGITS", 7 * VOCAB)
    monkeypatch.setattr("tokenclean_ray.token_loss.LEAST_CHUNK", 1)
    monkeypatch.setattr(TokenLoss, "_logits", lambda self, hidden: seen.append(len(hidden)) or inner(self, hidden))
    chunked = score_rows(loss_of, flat, mask, offsets, batch_tokens=1000)
    assert max(seen) == 7
    assert sum(seen) == mask.sum()
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


def test_bfloat16_bodies_give_float32_losses(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.bfloat16, "cpu")
    _, _, flat, mask, offsets = rows()
    found = score_rows(token_loss_for(model), flat, mask, offsets, batch_tokens=150)
    exact = score_rows(token_loss_for(model.float()), flat, mask, offsets, batch_tokens=150)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact)[mask].mean() < 0.2


def test_rows_of_the_original_context_do_not_depend_on_longer_ones_before():
    loss_of = token_loss_for(build("llama_dynamic"))
    found = []
    for longest in (10, 64):
        for lengths in ((longest,), (40, 40)):
            _, masks, ids, mask, offsets = rows(lengths=lengths)
            losses = score_rows(loss_of, ids, mask, offsets, batch_tokens=150)
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[1][:40], alone(build("llama_dynamic"), ids[:40], masks[0]), atol=1e-4)


def test_rope_groups():
    class Config:
        max_position_embeddings = 40
        rope_parameters = {"rope_type": "dynamic"}

    lengths = np.array([3, 40, 41, 50])
    assert rope_groups(Config(), lengths).tolist() == [0, 40, 41, 50]
    Config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 40}
    assert rope_groups(Config(), lengths).tolist() == [0, 0, 1, 1]
    Config.rope_parameters = {"rope_type": "default"}
    assert rope_groups(Config(), lengths).tolist() == [0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_on_a_gpu(name):
    model = build(name)
    ids, masks, flat, mask, offsets = rows()
    expected = np.concatenate([alone(model, i, m) for i, m in zip(ids, masks, strict=True)])
    fuse_norms(model.cuda())
    found = score_rows(token_loss_for(model), flat, mask, offsets, batch_tokens=150)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    half = score_rows(token_loss_for(model.to(torch.bfloat16)), flat, mask, offsets, batch_tokens=150)
    assert np.abs(half - expected)[mask].mean() < 0.2
