"""Bad models, kind by kind: one line that names the folder and says what is wrong, before it can score anything."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, save
from safetensors.torch import load_file, save_file
from templates import IM
from test_models import adapter
from transformers import T5Config

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.models import check_compatible, describe, load_adapter, load_model, load_tokenizer
from tokenclean_ray.score import PartScorer


def rewrite(name, change):
    """A change of a JSON file of a model's folder."""

    def make(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return make


def replace(name, content: bytes | None):
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def nan_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder):
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def bad_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")


def retokenize(**settings):
    return lambda folder: make_tokenizer(**settings).save_pretrained(folder)


def no_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


# kind → (what is done to a good model's folder, pattern of the error)
MODELS = {
    "no config": (replace("config.json", None), "the folder has no config.json"),
    "a config that is no JSON": (replace("config.json", b"{"), "not a valid JSON file"),
    "a config that is not UTF-8": (replace("config.json", b"\xff\xfe"), "not a valid JSON file"),
    "a config that is a list": (replace("config.json", b"[]"), "makes no causal language model"),
    "an unknown architecture": (
        replace("config.json", b'{"model_type": "nosuch"}'),
        "does not recognize this architecture",
    ),
    "no language model": (
        replace("config.json", T5Config().to_json_string().encode()),
        "makes no causal language model",
    ),
    "heads that do not divide": (rewrite("config.json", lambda c: c.update(num_attention_heads=5)), "not a multiple"),
    "a vocabulary below nothing": (rewrite("config.json", lambda c: c.update(vocab_size=-1)), "negative dimension"),
    "a vocabulary that is text": (rewrite("config.json", lambda c: c.update(vocab_size="x")), "expected int, got str"),
    "more layers than weights": (rewrite("config.json", lambda c: c.update(num_hidden_layers=3)), "lack 9 weights"),
    "other shapes than the weights": (
        rewrite("config.json", lambda c: c.update(intermediate_size=96)),
        "cannot be loaded",
    ),
    "no weights": (replace("model.safetensors", None), "the folder has no model.safetensors; save it with"),
    "empty weights": (replace("model.safetensors", b""), "its weights are damaged"),
    "weights that are none": (replace("model.safetensors", b"x" * 5000), "its weights are damaged"),
    "weights cut short": (cut_weights, "its weights are damaged"),
    "a weight missing": (drop_a_weight, r"lack 1 weights, model\.layers\.1\.mlp\.up_proj\.weight first"),
    "a shard missing": (lose_a_shard, r"the folder has no model-00002-of-\d+\.safetensors"),
    "an index that is none": (bad_index, "its weights are damaged"),
    "NaN weights": (nan_weights, "gives NaN losses: check its weights, or set model.dtype: float32"),
    "no tokenizer": (replace("tokenizer.json", None), "its tokenizer cannot be loaded"),
    "no file of a tokenizer": (no_tokenizer, "its tokenizer cannot be loaded"),
    "a tokenizer that is none": (replace("tokenizer.json", b"{"), "its tokenizer cannot be loaded"),
    "another vocabulary": (retokenize(specials=(*IM, "<extra>")), "has another vocabulary than model.base"),
    "a vocabulary beyond the embedding": (
        retokenize(specials=(*IM, *map(str, range(10**6, 10**6 + 200)))),
        "embeds 400 tokens, but the base's tokenizer has",
    ),
    "no eos token": (retokenize(eos=None), "has no eos_token: set one in its tokenizer_config.json"),
    "no chat template": (no_template, "has no chat template: set data.template: tulu"),
    "a chat template that is none": (replace("chat_template.jinja", b"{% for %}"), r"add \{% generation %\} markers"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Path(save(tmp_path_factory.mktemp("good") / "base", make_llama(scale=3.0), make_tokenizer()))


def open_model(path: str, good: Path) -> None:
    """What a run does with its models: look, tokenize, compare, load, try."""
    spec = describe(path)
    tokenizer = load_tokenizer(spec.path)
    build_encoder(tokenizer, "chat", 64, "truncate")
    check_compatible(spec, spec, tokenizer, 64)
    check_compatible(describe(str(good)), spec, load_tokenizer(str(good)), 64)
    PartScorer(Store("memory://unused"), [(spec, "losses/x")], "float32", Score(), gpu=False)


def test_a_good_model(good):
    open_model(str(good), good)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model(tmp_path, good, kind):
    make, expected = MODELS[kind]
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    make(folder)
    with pytest.raises(UserError, match=rf"^[^\n]*{expected}[^\n]*$") as caught:
        open_model(str(folder), good)
    assert str(folder) in str(caught.value)


def pickle_adapter(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")


def drop_a_delta(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "adapter_model.safetensors")


ADAPTERS = {
    "a config that is no JSON": (replace("adapter_config.json", b"{"), "its adapter_config.json cannot be read"),
    "a config that is a number": (replace("adapter_config.json", b"3"), "its adapter_config.json cannot be read"),
    "an unknown kind": (rewrite("adapter_config.json", lambda c: c.update(peft_type="NOSUCH")), "NOSUCH"),
    "another rank than the weights": (rewrite("adapter_config.json", lambda c: c.update(r=8)), "size mismatch"),
    "over another base": (
        rewrite("adapter_config.json", lambda c: c.update(base_model_name_or_path="x/y")),
        "set model.base to it",
    ),
    "of prompts": (
        rewrite("adapter_config.json", lambda c: c.update(peft_type="PREFIX_TUNING", num_virtual_tokens=4)),
        "PREFIX_TUNING that acts on prompts, not on weights, cannot be scored: take a LoRA adapter",
    ),
    "that a prompt switches on": (
        rewrite("adapter_config.json", lambda c: c.update(alora_invocation_tokens=[5])),
        "acts on prompts",
    ),
    "cut short": (replace("adapter_model.safetensors", b"x" * 99), "its weights are damaged"),
    "a weight missing": (drop_a_delta, "Found missing adapter keys"),
    "pickled": (pickle_adapter, "the folder has no adapter_model.safetensors"),
}


def open_adapter(path: str, good: Path) -> None:
    base = describe(str(good))
    spec = describe(path, base)
    load_adapter(load_model(base.path, torch.float32, "cpu"), spec.adapter)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter(tmp_path, good, kind):
    make, expected = ADAPTERS[kind]
    folder = Path(adapter(tmp_path / "lora", good))
    make(folder)
    with pytest.raises(UserError, match=rf"^[^\n]*{expected}[^\n]*$") as caught:
        open_adapter(str(folder), good)
    assert str(folder) in str(caught.value)
