"""What of a model is trained, of models of many kinds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer, save
from test_models import adapter
from test_token_loss import build, rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Lora, Train
from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import IGNORED, Rows, fit
from tokenclean_ray.models import describe, load_model
from tokenclean_ray.trainable import check_settings, save_trained, trainable, with_lora, with_weights

SETTINGS = {"learning_rate": 1e-2, "batch_rows": 3, "epochs": 3, "lora": {"r": 4, "dropout": 0.0}}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_model_that_begins_with_an_adapter_is_trained_whole(tmp_path, tokenizer):
    start = save(tmp_path / "start", make_llama(0, scale=2.0), tokenizer)
    spec = describe(adapter(tmp_path / "adapter", start), describe(start))
    loss_of = trainable(spec, Train(method="full"), seed=0)
    assert all(parameter.requires_grad for parameter in loss_of.parameters())


@pytest.mark.parametrize(("method", "frozen"), [("lora", {torch.bfloat16}), ("full", set())])
def test_what_is_trained_is_in_float32(tmp_path, method, frozen):
    """Where passes compute in half precision, and only what is frozen is kept in it."""
    spec = describe(save(tmp_path / "start", make_llama()))
    loss_of = trainable(spec, Train(method=method), seed=0, half=torch.bfloat16)
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in loss_of.parameters():
        found[parameter.requires_grad].add(parameter.dtype)
    assert found == {True: {torch.float32}, False: frozen}


def test_adapters_are_as_the_settings_say():
    lora = Lora(r=4, alpha=8, dropout=0.1)
    adapted = with_lora(make_llama(), lora, seed=0)
    found = adapted.peft_config["default"]
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 8, 0.1)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4
    assert layer.lora_dropout["default"].p == 0.1


@pytest.mark.parametrize("wanted", [True, False])
def test_activations_are_kept_or_computed_again_as_the_settings_say(tmp_path, wanted):
    spec = describe(save(tmp_path / "start", make_llama()))
    loss_of = trainable(spec, Train(activation_checkpointing=wanted), seed=0)
    assert loss_of.model.is_gradient_checkpointing == wanted


@pytest.mark.parametrize("targets", [["nowhere"], ["q_proj", "lm_head"]])
def test_lora_targets_that_cannot_be(tmp_path, targets):
    spec = describe(save(tmp_path / "start", make_llama()))
    with pytest.raises(UserError, match=r"train\.lora\.targets"):
        check_settings(spec, Train(lora={"targets": targets}))


def test_adapters_on_an_embedding_that_is_the_head_too(tmp_path):
    targets = Train(lora={"targets": ["embed_tokens", "q_proj"]})
    with pytest.raises(UserError, match=r"train\.lora\.targets names the embedding, which is the head too"):
        check_settings(describe(save(tmp_path / "tied", build("llama_tied"))), targets)
    check_settings(describe(save(tmp_path / "apart", build("llama"))), targets)


def test_experts_that_take_no_dropout(tmp_path):
    spec = describe(save(tmp_path / "experts", build("mixtral")))
    with pytest.raises(UserError, match=r"train\.lora\.dropout: peft adapts the experts of this model.* set it to 0"):
        check_settings(spec, Train())
    check_settings(spec, Train(lora={"targets": ["q_proj", "v_proj"]}))
    check_settings(spec, Train(lora={"dropout": 0.0}))


def test_a_model_that_cannot_compute_activations_again(tmp_path):
    spec = describe(save(tmp_path / "model", build("jetmoe")))
    with pytest.raises(UserError, match="JetMoeForCausalLM has none: set it to false"):
        check_settings(spec, Train())
    check_settings(spec, Train(activation_checkpointing=False))


@pytest.mark.parametrize("generation", [{"temperature": 0.6, "eos_token_id": 1}, {"length_penalty": 2.0}])
def test_a_trained_model_generates_as_its_start_did_and_stops_where_it_has_learnt_to(tmp_path, tokenizer, generation):
    """transformers refuses to save a temperature without do_sample, which it loads."""
    folder = Path(save(tmp_path / "start", make_llama(), tokenizer))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    start, settings, out = describe(str(folder)), Train(method="full"), tmp_path / "trained"
    weights = {"lm_head.weight": torch.ones(400, 32)}
    save_trained(str(out), start, settings, 0, weights, tokenizer, tulu=False)
    saved = json.loads((out / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert saved.pop("eos_token_id") == sorted({*ends, generation.get("eos_token_id", ends[0])})
    assert generation.items() - {("eos_token_id", 1)} <= saved.items()
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(trained.lm_head.weight, weights["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_a_model_that_learnt_the_paper_s_format_has_its_template(tmp_path):
    tokenizer = make_tokenizer(template=None)
    start = describe(save(tmp_path / "start", make_llama(), tokenizer))
    save_trained(str(tmp_path / "trained"), start, Train(method="full"), 0, {}, tokenizer, tulu=True)
    text = AutoTokenizer.from_pretrained(tmp_path / "trained").apply_chat_template(CHAT, tokenize=False)
    assert text == "<|user|>\na\n<|assistant|>\nb</s>"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_model_that_learnt_the_paper_s_format_is_asked_as_it_was_trained(tmp_path, adds_bos):
    tokenizer = make_tokenizer(template=None)
    if adds_bos:
        begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begin
    encoder = build_encoder(tokenizer, "tulu", 64, "reject")
    text, spans = encoder.render(CHAT, None)
    ((ids, mask),) = encoder.encode([text], [spans])
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos
    start = describe(save(tmp_path / "start", make_llama(), tokenizer))
    save_trained(str(tmp_path / "trained"), start, Train(method="full"), 0, {}, tokenizer, tulu=True)
    trained = AutoTokenizer.from_pretrained(tmp_path / "trained")
    assert trained.apply_chat_template(CHAT, return_dict=False) == ids.tolist()
    again = build_encoder(trained, "chat", 64, "reject")
    text, spans = again.render(CHAT, None)
    ((_, found),) = again.encode([text], [spans])
    assert found.tolist() == mask.tolist()


def test_weights_that_the_last_update_ruined_are_no_model(tmp_path, tokenizer):
    start = describe(save(tmp_path / "start", make_llama(), tokenizer))
    weights = {"lm_head.weight": torch.full((400, 32), torch.nan)}
    with pytest.raises(UserError, match=r"ruined lm_head\.weight: lower train\.learning_rate"):
        save_trained(str(tmp_path / "trained"), start, Train(method="full"), 0, weights, tokenizer, tulu=False)
    assert not (tmp_path / "trained").exists()


# what adapters change: all-linear, without routers that return more than a product, and Mamba's out_proj; dt_proj's
# have no gradient, since the model takes its weight alone
ADAPTED = {
    "llama": r"self_attn|mlp",
    "mixtral": r"self_attn|mlp\.gate|mlp\.experts",
    "llama4": r"self_attn|shared_expert",
    "modernbert": r"attn|mlp|lm_head",
    "mamba": r"in_proj|x_proj",
    "mistral3_with_images": r"language_model.*(self_attn|mlp)",
}
IMAGES = "vision_tower|multi_modal_projector"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ADAPTED)
def test_what_text_goes_through_is_trained(tmp_path, name, method):
    spec, settings = describe(save(tmp_path / name, build(name))), Train(**SETTINGS, method=method)
    check_settings(spec, settings)
    loss_of = trainable(spec, settings, seed=0)
    _, _, ids, mask, offsets = rows()
    curve = fit(loss_of, Rows(ids, np.where(mask, ids, IGNORED), offsets), settings)
    assert curve[-1] < curve[0]
    trained = {key: weight for key, weight in loss_of.model.named_parameters() if weight.requires_grad}
    before = dict(load_model(spec.path, "auto", "cpu").named_parameters())
    after = dict(with_weights(spec, settings, 0, trained).named_parameters())
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    wanted = re.compile(ADAPTED[name] if method == "lora" else f"^(?!.*({IMAGES}))")
    assert changed == {key for key in before if wanted.search(key) and (method == "full" or before[key].ndim > 1)}
