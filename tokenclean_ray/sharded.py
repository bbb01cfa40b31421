"""A model over the ranks of a process group: sharding, checkpoints, gathering what was trained. Needs no Ray.

Input: a model as `trainable` makes it, on every rank. Output: it in shards; folders of safetensors and JSON.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tokenclean_ray.errors import UserError
from tokenclean_ray.token_loss import TokenLoss

PROGRESS = "progress.json"
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


def shard(loss_of: TokenLoss, gpu: bool, half: torch.dtype | None = None) -> None:
    """FSDP2: each decoder layer, then the rest; passes compute in `half`, gradients are reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    mesh = init_device_mesh("cuda" if gpu else "cpu", (dist.get_world_size(),))  # else of a GPU that is not ours
    layers = set(loss_of.model._no_split_modules or ())
    for module in reversed(list(loss_of.model.modules())):  # inner ones first: Mamba names a layer and its mixer
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(loss_of, mesh=mesh, mp_policy=policy)


def gather(loss_of: TokenLoss) -> dict[str, Any]:
    """What was trained, by name: whole tensors on the CPU of the first rank; all ranks must take part."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return _trained(loss_of, get_model_state_dict(loss_of.model, options=whole))


def _trained(loss_of: TokenLoss, weights: dict[str, Any]) -> dict[str, Any]:
    """Without the second name of tied weights, under which they would be saved again, trained or not."""
    names = {name for name, parameter in loss_of.model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in weights.items() if name in names}


def _state(loss_of: TokenLoss, optimizer: Any) -> dict[str, Any]:
    return {
        "model": _trained(loss_of, get_model_state_dict(loss_of.model, options=TRAINED_ONLY)),
        "optimizer": get_optimizer_state_dict(loss_of.model, optimizer, options=TRAINED_ONLY),
    }


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a state, by flat names. What else it holds follows from the settings and the step."""
    moments = state["optimizer"]["state"].items()
    return {f"model.{name}": tensor for name, tensor in state["model"].items()} | {
        f"optimizer.{name}.{key}": tensor for name, values in moments for key, tensor in values.items()
    }


def save_checkpoint(folder: str, loss_of: TokenLoss, optimizer: Any, progress: dict[str, Any], rank: int) -> None:
    """Write this rank's shards as safetensors, their places as JSON: the default reader would unpickle."""
    writer = HuggingFaceStorageWriter(folder, save_distributed=True)
    tensors = _tensors(_state(loss_of, optimizer))
    dcp.save(tensors, storage_writer=writer)
    if rank == 0:
        whole = {"elements": sum(tensor.numel() for tensor in tensors.values())}
        (Path(folder) / PROGRESS).write_text(json.dumps(progress | whole))


def restore_checkpoint(folder: str, loss_of: TokenLoss, optimizer: Any) -> dict[str, Any]:
    """Bring model and optimizer to where a checkpoint was written, by any number of ranks.

    Returns:
        its progress.

    Raises:
        UserError: it is damaged, or of an older version; on every rank, as all read the same files.
    """
    try:
        progress = json.loads((Path(folder) / PROGRESS).read_text())
        reader = HuggingFaceStorageReader(folder)
        saved: Any = reader.read_metadata().state_dict_metadata
        # what is missing would be taken for a weight that had no gradient yet
        whole = sum(math.prod(chunk.sizes) for tensor in saved.values() for chunk in tensor.chunks)
        if whole != progress.pop("elements"):
            raise ValueError("files are missing")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the newest checkpoint is damaged, or of an older version of tokenclean_ray ({error}): delete the run's "
            "folder under train/ and run the same command again"
        ) from error
    state = _state(loss_of, optimizer)
    for moments in state["optimizer"]["state"].values():
        moments["step"].zero_()  # a weight that had no gradient yet has nothing saved, and goes on as a fresh one
    tensors = {name: tensor for name, tensor in _tensors(state).items() if name in saved or name.startswith("model.")}
    dcp.load(tensors, storage_reader=reader)  # in place
    set_model_state_dict(loss_of.model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(loss_of.model, optimizer, state["optimizer"], options=TRAINED_ONLY)
    return progress
