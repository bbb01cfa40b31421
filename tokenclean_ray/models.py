"""Models and tokenizers: what they are, whether they fit together, and loading them.

A model is named by a folder or a hub id; a LoRA adapter folder counts as its base with the adapter on top.
"""

import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError, nearest, why
from tokenclean_ray.hub import hub_model
from tokenclean_ray.imports import heavy_imports
from tokenclean_ray.layout import Store
from tokenclean_ray.memory import keep_freed_memory
from tokenclean_ray.storage import copy_once, filesystem

with heavy_imports():  # here, since an actor's arguments are of this module, and so its first import
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        PreTrainedModel,
    )

    from tokenclean_ray.kernels import fuse_attention, fuse_norms

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tokenclean" / "models"
OUT_OF_MEMORY = re.compile("can't allocate memory|out.of.memory|alloc_failed", re.IGNORECASE)
NO_CUDA = (
    "model.device: Ray counts GPUs on a node where torch sees none: install torch's build with CUDA there, or set "
    "it to cpu"
)
HALVES = (torch.bfloat16, torch.float16)
ADAPTER_CONFIG = "adapter_config.json"
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, StrictDataclassError, SafetensorError
)  # fmt: skip
"""What transformers and peft raise for files that are missing, damaged or do not fit together, or want a package."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as it will be loaded."""

    path: str
    """Absolute folder, URL or hub id of the full model."""
    adapter: str | None
    """Absolute folder or URL of a LoRA adapter on top, or None."""
    fingerprint: str
    """Of the weights' content: 16 hex digits."""
    vocabulary: int
    """Rows of the embedding."""
    bytes: int
    """Of the weight files; 0 where the hub does not say."""
    position_limit: int | None
    """Longest row of a model with learned positions; None for rotary and the like."""
    trusted: bool = False
    """Whether the model's own Python code may run."""
    revision: str | None = None
    """The commit of a model on the hub, which may move on while a run is on."""

    @property
    def name(self) -> str:
        """A folder name for what this model computes, readable and never another model's."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.adapter or self.path).name)[:40]
        return f"{readable}-{self.fingerprint[:8]}"


def describe(path: str, base: ModelSpec | None = None, trusted: bool = False) -> ModelSpec:
    """Look at a model without loading its weights.

    Args:
        path: a folder or a hub id.
        base: the run's base model; an adapter folder is taken as lying over it.
        trusted: the model's own Python code may run.

    Raises:
        UserError: no such model, an adapter where a model is wanted or over another base, missing files.
    """
    folder, revision = Path(local_folder(path)).expanduser(), None
    if folder.is_dir():
        folder = folder.resolve()
        where = path if "://" in path else str(folder)  # of an object store every machine makes its own copy
        if (folder / ADAPTER_CONFIG).is_file():
            return _describe_adapter(folder, base, where)
        if not (folder / "config.json").is_file():
            raise UserError(f"model {path}: the folder has no config.json; save it with save_pretrained()")
        files = _weight_files(folder, "model")
        code = sorted(folder.glob("*.py")) if trusted else []
        fingerprint = _hash_once(where, [folder / "config.json", *files, *code])
        size = sum(f.stat().st_size for f in files)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not folder.parent.is_dir():
        (revision, fingerprint, size), where = hub_model(path, trusted), path
    else:
        siblings = [str(p) for p in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        raise UserError(f"model {path}: no such folder{nearest(str(folder), siblings)}")
    try:
        model = empty_model(where, trusted, revision)
        vocabulary, limit = model.config.get_text_config().vocab_size, _position_limit(model)
    except (*UNREADABLE, AttributeError) as error:
        raise UserError(f"model {path}: its config.json makes no causal language model ({why(error)})") from error
    return ModelSpec(where, None, fingerprint, vocabulary, size, limit, trusted, revision)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that a folder's weights lie in, each of them whole; a pickle is never taken instead."""
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    try:
        if index.is_file() and not (folder / f"{stem}.safetensors").is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
        missing = [file.name for file in files if not file.is_file()]
        for file in files if not missing else ():
            with safe_open(file, "np"):
                pass  # it checks that the tensors cover the file
    except (*UNREADABLE, AttributeError) as error:
        raise UserError(f"model {folder}: its weights are damaged ({why(error)}): fetch or save it again") from error
    if missing:
        raise UserError(f"model {folder}: the folder has no {missing[0]}; save it with save_pretrained()")
    return files


def local_folder(path: str, weights: bool = True) -> str:
    """A model folder of an object store, copied to this machine once; local folders and hub ids as they are.

    Args:
        weights: or all but these, for what looks at the config and the tokenizer alone.
    """
    if "://" not in path:
        return path
    fs, root = filesystem(path)
    if not fs.isdir(root):
        raise UserError(f"model {path}: no such folder")
    names = (file.removeprefix(root).lstrip("/") for file in fs.find(root))
    # of its folders the one that tokenizers have; others hold a trainer's checkpoints
    files = sorted(name for name in names if "/" not in name or name.startswith("additional_chat_templates/"))
    folder = CACHE / digest([path, [str(fs.checksum(f"{root}/{name}")) for name in files]], 16)
    if not (weights or folder.is_dir()):
        folder = folder.with_suffix(".small")
        files = [name for name in files if not name.endswith(".safetensors")]
    copy_once(fs, {name: f"{root}/{name}" for name in files}, folder)
    return str(folder)


def on_this_machine(spec: ModelSpec) -> ModelSpec:
    """A model with the paths of its local copies."""
    return replace(spec, path=local_folder(spec.path), adapter=spec.adapter and local_folder(spec.adapter))


def _describe_adapter(folder: Path, base: ModelSpec | None, where: str) -> ModelSpec:
    if base is None:
        raise UserError(
            f"model {folder}: a LoRA adapter; it can be model.reference, not model.base or train.model: merge it"
        )
    files = _weight_files(folder, "adapter_model")
    try:
        adapter = dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"model {folder}: its {ADAPTER_CONFIG} cannot be read ({why(error)})") from error
    if "num_virtual_tokens" in adapter or adapter.get("alora_invocation_tokens"):
        raise UserError(
            f"model {folder}: an adapter of type {adapter.get('peft_type')} that acts on prompts, not on weights, "
            "cannot be scored: take a LoRA adapter, or a full model"
        )
    of = str(adapter.get("base_model_name_or_path") or "")
    if of and Path(of).name != Path(base.path).name:
        raise UserError(f"model {folder}: an adapter over {of}, but model.base is {base.path}: set model.base to it")
    fingerprint = hashlib.sha256((base.fingerprint + _hash_once(where, [folder / ADAPTER_CONFIG, *files])).encode())
    return replace(base, adapter=where, fingerprint=fingerprint.hexdigest()[:16])


def _hash_once(where: str, files: list[Path]) -> str:
    """`hash_files`; of a model of an object store once, since its copy lies in a folder that is named after it."""
    if "://" not in where:
        return hash_files(files)
    copy, note = Store(str(files[0].parent)), f".{digest([file.name for file in files], 16)}.json"
    found = copy.read_json(note)
    if found is None:
        copy.write_json(note, found := hash_files(files))
    return str(found)


def hash_files(files: list[Path]) -> str:
    """16 hex digits of the files' names and content, in their order."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()[:16]


def read_config(path: str, trusted: bool, revision: str | None) -> Any:
    """A model's config.json as transformers has it. Arguments as of `load_model`."""
    folder = local_folder(path, weights=False)
    return AutoConfig.from_pretrained(folder, trust_remote_code=trusted, revision=revision or "main")


def empty_model(path: str, trusted: bool, revision: str | None = None) -> Any:
    """A model without its weights, on the meta device. Arguments as of `load_model`."""
    config = read_config(path, trusted, revision)
    with torch.device("meta"):
        return class_for(config).from_config(config, trust_remote_code=trusted)


def class_for(config: Any) -> Any:
    """What builds a model: many that write text read images too (Mistral 3, Qwen 3 VL); here they see text alone."""
    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    text_alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return AutoModelForImageTextToText if with_images and not (text_alone or own_code) else AutoModelForCausalLM


def text_parts(model: Any) -> list[Any]:
    """The modules that text goes through, of a model that may read images too: its decoder and its head."""
    return [part for part in (text_body(model), model.get_output_embeddings()) if part is not None]


def text_body(model: Any) -> Any:
    """The decoder of a model that may read images too; of ModernBERT, whose head has that name, all of it."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model


def _position_limit(model: Any) -> int | None:
    tokens = model.get_input_embeddings()
    learned = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in text_body(model).named_modules()
        if isinstance(module, torch.nn.Embedding) and module is not tokens and ("pos" in name or name.endswith("wpe"))
    ]
    return min(learned, default=None)


def load_tokenizer(path: str, trusted: bool = False, revision: str | None = None) -> Any:
    """A model's tokenizer; raises `UserError` where there is none. `trusted` and `revision` as of `load_model`."""
    try:
        folder = local_folder(path, weights=False)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, revision=revision or "main")
    except UNREADABLE as error:
        raise UserError(f"model {path}: its tokenizer cannot be loaded ({why(error)})") from error


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Two tokenizers that give tokens the same ids share it."""
    return digest(tokenizer.get_vocab(), 16)


def check_compatible(base: ModelSpec, reference: ModelSpec, tokenizer: Any, max_length: int) -> None:
    """Raise `UserError` where the two models cannot score the same tokens.

    Args:
        tokenizer: the base model's.
        max_length: tokens of the longest row.
    """
    if reference.path != base.path and _has_tokenizer(reference.path):
        own = tokenizer.get_vocab()
        other = load_tokenizer(reference.path, reference.trusted, reference.revision).get_vocab()
        if own != other:
            differing = len(own.items() ^ other.items())
            raise UserError(
                f"model.reference {reference.path} has another vocabulary than model.base {base.path} "
                f"({differing} entries differ): token losses cannot be compared; take a reference tuned from the base"
            )
    for spec, key in ((base, "model.base"), (reference, "model.reference")):
        if spec.vocabulary < len(tokenizer):
            raise UserError(
                f"{key} {spec.path} embeds {spec.vocabulary} tokens, but the base's tokenizer has {len(tokenizer)}: "
                "take models that share the tokenizer, or resize the embedding"
            )
        if spec.position_limit is not None and spec.position_limit < max_length:
            raise UserError(
                f"{key} {spec.path} has positions for {spec.position_limit} tokens: set data.max_length to that or less"
            )


def _has_tokenizer(path: str) -> bool:
    folder = Path(local_folder(path, weights=False))
    return not folder.is_dir() or any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json"))


def load_model(
    path: str, dtype: torch.dtype | str, device: str, trusted: bool = False, revision: str | None = None
) -> Any:
    """A causal language model ready for inference.

    Args:
        device: cpu, cuda, or auto to spread it over the visible GPUs.
        trusted: the model's own Python code may run.
        revision: of a model on the hub; None for the newest.

    Raises:
        UserError: no GPU where one is wanted, or one without bfloat16 where that is; GPUs with too little room; weights
            that are damaged, missing or of other shapes than the config says.
        RuntimeError, MemoryError: see `out_of_memory`.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(NO_CUDA)
    if device != "cpu" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"model.dtype: {torch.cuda.get_device_name()} has no bfloat16: set it to float32, or, where nothing is "
            "trained, float16"
        )
    folder = local_folder(path)
    # cuDNN plans for every shape of a batch anew, 39 ms on an H200, and ours hardly repeat; flash attention takes 0.2
    # to 0.6 ms, cuDNN's after that a third less
    torch.backends.cuda.enable_cudnn_sdp(False)
    fuse_attention()
    if device == "cpu":
        keep_freed_memory()  # GPUs have an allocator of their own
    try:
        config = read_config(folder, trusted, revision)
        model, report = class_for(config).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            attn_implementation=attention_for(config, device == "cpu" and dtype in HALVES),
            trust_remote_code=trusted,
            revision=revision or "main",
            output_loading_info=True,
        )
    except UNREADABLE as error:
        if out_of_memory(error):  # which is a RuntimeError too
            raise
        raise UserError(f"model {path}: its weights cannot be loaded ({why(error)})") from error
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"model {path}: its files lack {len(missing)} weights, {missing[0]} first: fetch it again")
    if elsewhere := {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()} - {device}:
        raise UserError(
            f"model {path}: {device} leaves a part of it to the {min(elsewhere)}, since the GPUs have too little room: "
            "spread it over more (score.gpus_per_actor), or set score.colocate: false to hold one model at a time"
        )
    if device != "cpu":
        fuse_norms(model)
    return model.eval()


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch, or what of CUDA and the CPU has no type for it, ran out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def attention_for(config: Any, half_on_cpu: bool = False) -> str | None:
    """eager for models that cap their attention's logits (Gemma 2), which sdpa silently leaves out, and for half
    precision on a CPU, where sdpa fails if that has AMX (torch 2.13, with `imports.KERNELS`); else transformers' own
    choice: sdpa, where the model has it."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped or half_on_cpu else None


def load_adapter(model: Any, adapter: str) -> Any:
    """The model with a LoRA adapter, in the model's own precision, which `disable_adapter()` switches off."""
    from peft import PeftModel  # two seconds, and most runs have no adapter

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # else float32, and each layer would go to it and back: half as slow again in bfloat16, by calculation
            return PeftModel.from_pretrained(model, local_folder(adapter), autocast_adapter_dtype=False).eval()
    except (*UNREADABLE, UserWarning) as error:
        raise UserError(f"model {adapter}: the adapter cannot be loaded over its base ({why(error)})") from error
