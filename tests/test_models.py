"""What a model is, and whether two fit together."""

import hashlib
import json
import platform
import resource
import shutil
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import fsspec
import pytest
import torch
from conftest import Handler, make_llama, run_python, save, serving
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tokenclean_ray import models
from tokenclean_ray.errors import UserError
from tokenclean_ray.estimate import model_size
from tokenclean_ray.layout import Store
from tokenclean_ray.models import check_compatible, describe, load_model, load_tokenizer, local_folder, out_of_memory


def adapter(folder, base, **settings):
    """The folder of random adapters over a model's folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


def test_fingerprint_is_of_the_content(tmp_path, tokenizer):
    one = describe(save(tmp_path / "one", make_llama(0), tokenizer))
    same = describe(str(shutil.copytree(tmp_path / "one", tmp_path / "same")))
    other = describe(save(tmp_path / "other", make_llama(1), tokenizer))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.name.startswith("one-")
    assert one.vocabulary == 400
    assert one.position_limit is None


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"no such folder; did you mean .*/model\?"):
        describe(str(tmp_path / "modal"))


def test_adapters(tmp_path, model_pair):
    base = describe(model_pair[0])
    path = adapter(tmp_path / "lora", model_pair[0])
    reference = describe(path, base)
    assert (reference.path, reference.adapter) == (base.path, str(tmp_path / "lora"))
    assert reference.fingerprint != base.fingerprint
    with pytest.raises(UserError, match=r"model\.reference, not model\.base"):
        describe(path)
    with pytest.raises(UserError, match=r"set model\.base"):
        describe(path, describe(model_pair[1]))


def test_a_reference_that_embeds_fewer_tokens(tmp_path, model_pair, tokenizer):
    base = describe(model_pair[0])
    with pytest.raises(UserError, match="embeds 100 tokens"):
        check_compatible(base, describe(save(tmp_path / "b", make_llama(1, vocab=100))), tokenizer, 512)


def test_learned_positions_limit_the_length(tmp_path, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    spec = describe(save(tmp_path / "gpt2", model, tokenizer))
    assert spec.position_limit == 64
    check_compatible(spec, spec, tokenizer, 64)
    with pytest.raises(UserError, match="positions for 64 tokens"):
        check_compatible(spec, spec, tokenizer, 65)


def test_a_model_of_an_object_store_is_copied_once(tmp_path, model_pair, monkeypatch):
    monkeypatch.setattr("tokenclean_ray.models.CACHE", tmp_path / "cache")
    fsspec.filesystem("memory").put(model_pair[0], "/store/base", recursive=True)
    spec = describe("memory://store/base")
    assert spec.fingerprint == describe(model_pair[0]).fingerprint
    assert load_tokenizer(spec.path).get_vocab() == load_tokenizer(model_pair[0]).get_vocab()
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1
    assert local_folder(spec.path, weights=False) == local_folder(spec.path)
    with pytest.raises(UserError, match="no such folder"):
        describe("memory://store/nothing")


def test_a_model_of_an_object_store_is_hashed_once(tmp_path, model_pair, tokenizer, monkeypatch):
    monkeypatch.setattr("tokenclean_ray.models.CACHE", tmp_path / "cache")
    store = fsspec.filesystem("memory")
    store.put(model_pair[0], "/hashed/base", recursive=True)
    store.put(adapter(tmp_path / "lora", model_pair[0]), "/hashed/lora", recursive=True)
    read, hashed = [], models.hash_files
    monkeypatch.setattr(models, "hash_files", lambda files: read.append(files) or hashed(files))

    def both():
        base = describe("memory://hashed/base")
        return base, describe("memory://hashed/lora", base)

    found = both()
    assert len(read) == 2
    assert both() == found
    assert len(read) == 2
    assert found[0].fingerprint == describe(model_pair[0]).fingerprint
    store.put(save(tmp_path / "other", make_llama(5), tokenizer) + "/model.safetensors", "/hashed/base/")
    assert both()[0].fingerprint == describe(str(tmp_path / "other")).fingerprint != found[0].fingerprint


def test_weights_are_not_fetched_for_what_reads_the_config_alone(tmp_path, model_pair, monkeypatch):
    monkeypatch.setattr("tokenclean_ray.models.CACHE", tmp_path / "cache")
    fsspec.filesystem("memory").put(model_pair[0], "/other/base", recursive=True)
    assert load_tokenizer("memory://other/base").get_vocab() == load_tokenizer(model_pair[0]).get_vocab()
    assert model_size("memory://other/base") == model_size(model_pair[0])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    load_model("memory://other/base", torch.float32, "cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's: elsewhere nothing is set")
def test_freed_memory_is_kept_for_the_next_tensors(model_pair):
    load_model(model_pair[0], torch.float32, "cpu")
    torch.ones(16 << 20)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)
    pages = 5 * (64 << 20) // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 3  # without, all of them


def test_a_gpu_without_bfloat16(tmp_path, monkeypatch):
    """Training computes in bfloat16 under float16 too: who does as is said must not be told the same again."""
    cuda = {"is_available": True, "is_bf16_supported": False, "get_device_name": "Tesla T4"}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value, **_: value)
    path = save(tmp_path / "model", make_llama())
    with pytest.raises(UserError, match="T4 has no bfloat16: set it to float32, or, where nothing is trained, float16"):
        load_model(path, torch.bfloat16, "cuda")


# -- the hub -----------------------------------------------------------------------------------------------------

SHA = "0123456789abcdef" * 2 + "01234567"


def content_id(file):
    """What the hub and its cache name a file's content by: LFS's sum, or git's."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(Handler):
    """What transformers asks of the hub for a model; the newest commit is another one by now."""

    folder: ClassVar[Path]
    commit: ClassVar[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        _, resolve, file = path.partition(f"/resolve/{self.commit}/")
        if resolve and (found := self.folder / file).is_file():
            return self.answer(found.read_bytes(), 200, [("ETag", f'"{content_id(found)}"')])
        if path == "/api/models/owner/tiny":
            siblings = [self.sibling(file) for file in self.folder.iterdir()]
            copies = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors")
            siblings += [{"rfilename": name, "size": 999, "blobId": "0" * 40} for name in copies]
            return self.answer({"id": "owner/tiny", "sha": self.commit, "siblings": siblings})
        return self.answer(b"", 404, [("X-Error-Code", "EntryNotFound")])

    def sibling(self, file):
        known = {"rfilename": file.name, "size": 5000, "blobId": content_id(file)}
        if file.suffix != ".safetensors":
            return known
        return known | {"blobId": "1" * 40, "lfs": {"sha256": content_id(file), "size": 5000, "pointerSize": 130}}

    def answer(self, value, status=200, headers=()):
        super().answer(value, status, [("X-Repo-Commit", self.commit), *headers])


LOAD = """
import json, torch
from tokenclean_ray.models import describe, load_model, load_tokenizer
spec = describe("owner/tiny")
model = load_model(spec.path, torch.float32, "cpu", revision=spec.revision)
tokens = len(load_tokenizer(spec.path, revision=spec.revision))
print(json.dumps([spec.name, spec.bytes, spec.revision, model.lm_head.weight.sum().item(), tokens]))
"""


def test_a_model_of_the_hub_is_of_one_commit_and_its_size_is_known(tmp_path, tokenizer):
    """A process of its own, because the hub's address is read at import."""
    model = make_llama(0)
    Hub.folder, Hub.commit = Path(save(tmp_path / "tiny", model, tokenizer)), SHA
    with serving(Hub) as address:
        hub = {"HF_ENDPOINT": f"http://{address}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        name, size, revision, total, tokens = json.loads(run_python(LOAD, **hub))
    assert (size, revision, tokens) == (5000, SHA, len(tokenizer))
    assert total == pytest.approx(model.lm_head.weight.sum().item(), abs=1e-4)
    # nodes without a way out have a filled cache
    size = (tmp_path / "tiny" / "model.safetensors").stat().st_size
    assert json.loads(run_python(LOAD, **hub | {"HF_HUB_OFFLINE": "1"})) == [name, size, revision, total, tokens]


DESCRIBE = """
from tokenclean_ray.models import describe
for trusted in (False, True):
    spec = describe("owner/tiny", trusted=trusted)
    print(spec.name)
print(spec.revision)
"""


def test_a_commit_to_the_hub_that_leaves_config_and_weights_alone_makes_no_other_model(tmp_path, tokenizer):
    Hub.folder = Path(save(tmp_path / "tiny", make_llama(0), tokenizer))
    found = []
    with serving(Hub) as address:
        hub = {"HF_ENDPOINT": f"http://{address}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}

        def commit(digit):
            Hub.commit = digit * 40
            found.append(run_python(DESCRIBE, **hub).split())

        commit("a")
        (Hub.folder / "README.md").write_text("a card")
        commit("b")
        save(Hub.folder, make_llama(1))
        commit("c")
        save(Hub.folder, make_llama(1, rms_norm_eps=1e-5))
        commit("d")
        (Hub.folder / "model-00001-of-00002.safetensors").write_bytes(b"of another sharding")
        commit("e")
        (Hub.folder / "model-00001-of-00002.safetensors").unlink()
        (Hub.folder / "model.safetensors").rename(Hub.folder / "x.safetensors")
        commit("f")
    (first, card, weights, config, two, other), with_code, revisions = zip(*found, strict=True)
    assert first == card
    assert len({card, weights, config}) == 3
    assert two == config  # whose weights transformers takes
    assert other == f"tiny-{'f' * 8}"  # nobody knows what is loaded
    assert len(set(with_code)) == 6  # any file may be code
    assert list(revisions) == [digit * 40 for digit in "abcdef"]  # what is loaded is the newest


def test_further_chat_templates_go_where_a_model_goes(tmp_path, model_pair, monkeypatch):
    monkeypatch.setattr("tokenclean_ray.models.CACHE", tmp_path / "cache")
    tokenizer = load_tokenizer(model_pair[0])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = save(tmp_path / "model", make_llama(), tokenizer)
    shutil.copytree(folder, tmp_path / "model" / "checkpoint-5")
    Store("memory://templates").put_folder(folder, "model")
    assert load_tokenizer("memory://templates/model").chat_template == tokenizer.chat_template
    assert not list((tmp_path / "cache").rglob("checkpoint-5"))


def test_a_reference_without_a_tokenizer_may_lie_in_an_object_store(tmp_path, model_pair, tokenizer, monkeypatch):
    monkeypatch.setattr("tokenclean_ray.models.CACHE", tmp_path / "cache")
    fsspec.filesystem("memory").put(save(tmp_path / "bare", make_llama(1)), "/bare/reference", recursive=True)
    check_compatible(describe(model_pair[0]), describe("memory://bare/reference"), tokenizer, 64)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_memory_runs_out_in_many_words(error, expected):
    assert out_of_memory(error) == expected
