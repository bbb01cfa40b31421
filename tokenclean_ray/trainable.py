"""What of a model is trained: fresh adapters, or all weights that text goes through. Needs no Ray.

Input: a model, the settings. Output: the model as it is trained, and with what was trained.
"""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig

from tokenclean_ray.chat_template import TULU, build_encoder
from tokenclean_ray.config import Lora, Train
from tokenclean_ray.errors import UserError
from tokenclean_ray.kernels import fuse_norms
from tokenclean_ray.models import ModelSpec, attention_for, empty_model, load_adapter, load_model, text_parts
from tokenclean_ray.token_loss import TokenLoss, token_loss_for

NO_PRODUCTS = {"Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear"}
"""Linear layers by their class that take or return something else."""
MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Models whose kernels read the weight of out_proj past an adapter, so that peft refuses one."""


def check_settings(start: ModelSpec, settings: Train) -> None:
    """Raise `UserError` where a model cannot be trained as the settings say; looks at its config alone."""
    model = empty_model(start.path, start.trusted, start.revision)
    if settings.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"train.activation_checkpointing: {type(model).__name__} has none: set it to false")
    if settings.method == "lora":
        with torch.device("meta"):  # else peft makes the adapters, and those of experts take minutes
            with_lora(model, settings.lora, 0)


def trainable(
    start: ModelSpec,
    settings: Train,
    seed: int,
    half: torch.dtype | None = None,
    gpu: bool = False,
    check: bool = True,
) -> TokenLoss:
    """A model ready to be trained: with fresh adapters, or all weights that text goes through; these in float32.

    Args:
        seed: of the adapters.
        half: what passes will compute in, and what is frozen is kept in; None: float32.
        gpu: on this worker's GPU, where it has room.
        check: compare its losses to its own logits; of several ranks one does, whose `full_logits` the others take.

    Raises:
        UserError: a model that `check_settings` or `token_loss_for` refuses.
    """
    frozen = half if half and settings.method == "lora" else torch.float32
    model = _start_model(start, frozen, _device_with_room(start) if gpu else "cpu")
    if half and not gpu:
        model.set_attn_implementation("eager")  # see `attention_for`
    if settings.method == "lora":
        model = with_lora(model, settings.lora, seed).get_base_model()
    else:
        model.requires_grad_(False)
        for part in text_parts(model):
            part.requires_grad_(True)
    if gpu:
        fuse_norms(model)  # a model that was loaded on the CPU
    loss_of = token_loss_for(model) if check else TokenLoss(model)
    if gpu and model._supports_sdpa and attention_for(model.config) is None:
        model.set_attn_implementation("sdpa")  # a model that was loaded on the CPU, in half precision, has eager
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loss_of


def _device_with_room(start: ModelSpec) -> str:
    """This worker's GPU, where loading and checking a model takes seconds, if it has room for all of it before it is
    sharded: float32, of files that are mostly bfloat16, in half of what is free."""
    room = torch.cuda.mem_get_info()[0] / 2
    return f"cuda:{torch.cuda.current_device()}" if 0 < 2 * start.bytes <= room else "cpu"


def _start_model(start: ModelSpec, dtype: Any, device: str = "cpu") -> Any:
    model = load_model(start.path, dtype, device, start.trusted, start.revision)
    if not start.adapter:
        return model
    return load_adapter(model, start.adapter).merge_and_unload()


def with_lora(model: Any, lora: Lora, seed: int) -> Any:
    """The model with fresh adapters, the same for the same seed."""
    torch.manual_seed(seed)  # every rank, and the export, begin with the same adapters
    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_not_adapted(model),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # it looks among modules for what it knows of experts, which are parameters
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        if lora.dropout and "dropout" in str(error):
            raise UserError(
                "train.lora.dropout: peft adapts the experts of this model, as tensors that take no dropout: set it to "
                "0, or name train.lora.targets without them, such as [q_proj, k_proj, v_proj, o_proj]"
            ) from error
        raise UserError(f"train.lora.targets: {error}") from error
    base = adapted.get_base_model()
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        raise UserError("train.lora.targets names the head, whose weights alone make the logits here: leave it out")
    embedding = base.get_input_embeddings()
    if isinstance(embedding, BaseTunerLayer) and embedding.weight is base.get_output_embeddings().weight:
        raise UserError(
            "train.lora.targets names the embedding, which is the head too: merged, its adapter would change both, and "
            "it is trained for one: leave it out"
        )
    return adapted


def _not_adapted(model: Any) -> list[str]:
    """Linear layers that all-linear would take too: those that no text goes through, and where adapters cannot be."""
    seen = {id(module) for part in text_parts(model) for module in part.modules()}
    mamba = model.config.get_text_config().model_type in MAMBA
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (id(module) not in seen or type(module).__name__ in NO_PRODUCTS or (mamba and name.endswith(".out_proj")))
    ]


def save_trained(
    folder: str, start: ModelSpec, settings: Train, seed: int, weights: dict[str, Any], tokenizer: Any, tulu: bool
) -> None:
    """An ordinary Hugging Face folder: the model that was trained, adapters merged, and its tokenizer.

    Args:
        weights: what was trained, by name: whole tensors on the CPU.
        tulu: rows were written in the paper's format, not by the tokenizer's chat template.

    Raises:
        UserError: weights that are no numbers any more.
    """
    if ruined := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise UserError(f"the last update ruined {ruined[0]}: lower train.learning_rate, check the model")
    model = with_weights(start, settings, seed, weights)
    generation = model.generation_config if model.can_generate() else None
    if generation:
        model.generation_config = GenerationConfig()  # it refuses what it loads: a temperature without do_sample
    model.save_pretrained(folder)
    if tulu:  # whose rows begin as the tokenizer begins texts, while chat templates say all themselves
        begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = "{{ bos_token }}" * begins + TULU
    tokenizer.save_pretrained(folder)
    if generation:
        generation.eos_token_id = _with_ends_of_turns(generation.eos_token_id, tokenizer)
        generation.to_json_file(f"{folder}/generation_config.json")


def _with_ends_of_turns(ends: int | list[int] | None, tokenizer: Any) -> int | list[int] | None:
    """What ends generation, with what ends answers: the model has learnt to stop by that. Qwen's base models end texts
    by another token."""
    known = [ends] if isinstance(ends, int) else ends or []
    try:
        enders = build_encoder(tokenizer, "chat", 2, "truncate").enders
    except UserError:  # rows were made elsewhere, by what it does not tell
        return ends
    learnt = tokenizer.convert_tokens_to_ids(sorted(enders))
    return ends if set(learnt) <= set(known) else sorted({*known, *learnt})


def with_weights(start: ModelSpec, settings: Train, seed: int, weights: dict[str, Any]) -> Any:
    """The model that was trained, in the precision of its files, adapters merged.

    Args:
        weights: what was trained, by name.
    """
    model = _start_model(start, "auto")
    wrapped = with_lora(model, settings.lora, seed) if settings.method == "lora" else None
    missing = (wrapped.get_base_model() if wrapped else model).load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise AssertionError(f"trained weights that the model has not: {missing.unexpected_keys[:3]}")
    return wrapped.merge_and_unload() if wrapped else model
