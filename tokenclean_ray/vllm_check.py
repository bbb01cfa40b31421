"""What is checked before a vLLM engine is asked for, and what its losses are called. Needs no vLLM."""

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tokenclean_ray.batching import rope_scaling
from tokenclean_ray.config import Score
from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError
from tokenclean_ray.models import ModelSpec, on_this_machine, read_config

# engine arguments that change where and how fast a loss is computed, not what it is
NEUTRAL = frozenset(
    {"tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "max_model_len"}
    | {"gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "enforce_eager"}
    | {"download_dir", "block_size", "max_parallel_loading_workers", "safetensors_load_strategy"}
)


def fit(models: list[ModelSpec], score: Score, max_length: int) -> Score:
    """Check what can be checked without vLLM; returns the section with `max_model_len` filled in.

    Args:
        models: what one run compares.
        max_length: tokens of the longest row.

    Raises:
        UserError: models that cannot be scored alike, an adapter, RoPE scaling or length that vLLM would get wrong.
    """
    models = [on_this_machine(model) for model in models]
    adapters = [model.adapter for model in models if model.adapter]
    if score.colocate is True and not adapters and len(models) > 1:
        raise UserError("score.colocate: a vLLM engine takes whole GPUs, so two models take turns: leave it at auto")
    for adapter in adapters:
        check_adapter(Path(adapter))
    configs = {model.path: read_config(model.path, model.trusted, model.revision) for model in models}
    methods = {path: _quantisation(config) for path, config in configs.items()}
    if len(set(methods.values())) > 1:
        found = ", ".join(f"{path}: {method or 'none'}" for path, method in methods.items())
        raise UserError(f"base and reference differ in quantisation ({found}): their losses cannot be compared")
    for path, config in configs.items():
        _check_rope(path, config.get_text_config(), max_length)
    limits = {f"model {model.path}": model.position_limit for model in models}
    for what, limit in {"score.vllm.max_model_len": score.vllm.get("max_model_len"), **limits}.items():
        if limit is not None and limit < max_length + 1:
            raise UserError(
                f"{what} allows {limit} tokens, and vLLM wants one place after a row of data.max_length = "
                f"{max_length}: set data.max_length to {limit - 1} or less; data.on_overflow says what happens to "
                "longer rows"
            )
    return score.model_copy(update={"vllm": {"max_model_len": max_length + 1, **score.vllm}})


def check_adapter(folder: Path) -> list[str]:
    """The names of the linear maps that an adapter changes, such as q_proj.

    Raises:
        UserError: it is more than low-rank deltas inside the layers. vLLM drops deltas of the head and the embedding
            from prompt log-probs without a word.
    """
    modules = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                delta = re.fullmatch(r".*\.\d+\..*?(\w+)\.lora_[AB]\.weight", name)
                if not delta:
                    raise UserError(
                        f"model.reference {folder}: {name} is not a LoRA delta of a linear layer inside the body, and "
                        "vLLM cannot score with it: merge the adapter, or set score.backend: transformers"
                    )
                modules.add(delta[1])
    return sorted(modules)


def _quantisation(config: Any) -> str:
    return str((getattr(config, "quantization_config", None) or {}).get("quant_method") or "")


def _check_rope(path: str, config: Any, max_length: int) -> None:
    """vLLM chooses the frequencies once for the longest row it allows; transformers chooses them row by row."""
    kind, original = rope_scaling(config)
    if kind == "dynamic" or (kind == "longrope" and max_length >= original):
        advice = f"set data.max_length below {original}, or " if kind == "longrope" else ""
        raise UserError(
            f"model {path}: with {kind} RoPE scaling vLLM's losses of short rows differ from the model's own: "
            f"{advice}set score.backend: transformers"
        )


def folder_suffix(score: Score) -> str:
    """What tells a backend's losses from another's, and from those under other engine arguments that matter."""
    if score.backend != "vllm":
        return ""
    telling = {key: value for key, value in score.vllm.items() if key not in NEUTRAL}
    return f"-vllm-{digest(telling)}" if telling else "-vllm"
