"""`tokenclean benchmark train`: fine-tuning on masked tokens, and what people write first, on the same rows.

Input: a workload, of whose response tokens a random share is kept. Output: figures. Adapters, optimiser and updates are
the same on both sides; each variant runs in a process of its own, so that its memory is its own.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from tokenclean_ray.batching import GPU_LEAST_TRAINING, budget_on, pad
from tokenclean_ray.benchmark.machine import add_baselines, alone, device_here, dtype_on, machine, memory, wait
from tokenclean_ray.benchmark.workload import Workload, in_order, padding, planned, prepare, read_rows
from tokenclean_ray.config import Lora, Train
from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import IGNORED, Rows, make_optimizer, plan_updates, take_step, train_steps
from tokenclean_ray.models import load_model
from tokenclean_ray.sharded import shard
from tokenclean_ray.token_loss import TokenLoss
from tokenclean_ray.trainable import with_lora

KEPT = 0.6
SHARES = (1.0, 0.6, 0.3, 0.1)  # of kept tokens, for the memory
SETTINGS = Train(lora=Lora(dropout=0.0), activation_checkpointing=False)


def measure(data: str | None, rows: int, baseline: bool, models: list[str], **_: Any) -> dict[str, Any]:
    """Train adapters of a random Llama of a size, see `workload.size_of`, on rows for an epoch.

    Raises:
        UserError: no such size, or rows for one update alone.
    """
    size = " ".join(models)  # which is none, where there are two
    device = device_here()
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(Path(folder), read_rows(data, rows), 1, size)
        if len(work.lengths) <= SETTINGS.batch_rows:
            raise UserError(f"--rows: updates are timed from the second on: give more than {SETTINGS.batch_rows} rows")
        record = machine(device) | work.figures | {"model": size, "kept_share": KEPT}
        ours = {share: alone(_ours, work, share, device) for share in SHARES}
        record["ours"] = ours[KEPT]
        record["peak_memory_by_kept_share"] = {f"{share:g}": ours[share]["peak_memory"] for share in SHARES}
        losses = record["ours"].pop("losses")

        def written_first(cudnn: bool) -> dict[str, Any]:
            plain = alone(_as_written_first, work, KEPT, device, cudnn)
            expected = plain.pop("losses")
            return plain | {"difference": max(abs(a - b) for a, b in zip(losses, expected, strict=True))}

        if baseline:
            add_baselines(record, device, written_first)
    return record


def _kept(work: Workload, share: float) -> Rows:
    keep = work.mask & (np.random.default_rng(0).random(len(work.ids)) < share)
    return Rows(work.ids, np.where(keep, work.ids, IGNORED).astype(np.int32), work.offsets)


def _adapted(model: Any) -> TokenLoss:
    return TokenLoss(with_lora(model, SETTINGS.lora, 0).get_base_model())


def _timed(steps: Any, tokens: list[int], device: str) -> dict[str, Any]:
    """Run steps that yield their loss; the first, which costs more, does not count."""
    losses = [next(steps)]
    wait(device)
    began = time.perf_counter()
    losses += list(steps)
    wait(device)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens_per_s": sum(tokens[1:]) / seconds,
        "peak_memory": memory(device),
        "losses": losses,
    }


def _ours(work: Workload, share: float, device: str) -> dict[str, Any]:
    rows = _kept(work, share)
    loss_of = _adapted(load_model(work.model, getattr(torch, dtype_on(device)), device))
    if device == "cuda":  # as a worker of a run does, in half precision; in float32 that is not needed for one
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        shard(loss_of, True, torch.bfloat16)
    updates = plan_updates(len(rows.lengths), SETTINGS.batch_rows, SETTINGS.epochs, 0)
    steps = train_steps(loss_of, make_optimizer(loss_of, SETTINGS), rows, SETTINGS, seed=0)
    budget = budget_on(device == "cuda", SETTINGS.batch_tokens)
    found = _timed((loss for _, loss, _ in steps), [int(rows.lengths[update].sum()) for update in updates], device)
    return found | {"padding": padding(rows.lengths, planned(rows.lengths, updates, budget, GPU_LEAST_TRAINING))}


def _as_written_first(work: Workload, share: float, device: str, cudnn: bool) -> dict[str, Any]:
    """Micro-batches in order, padded to their longest, an attention mask, full logits, the loss of every position."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    rows = _kept(work, share)
    loss_of = _adapted(LlamaForCausalLM.from_pretrained(work.model, dtype=getattr(torch, dtype_on(device))).to(device))
    updates = plan_updates(len(rows.lengths), SETTINGS.batch_rows, SETTINGS.epochs, 0)
    batches = [batch for update in updates for batch in in_order(update)]
    found = _timed(_plain_steps(loss_of, rows, updates), [int(rows.lengths[u].sum()) for u in updates], device)
    return found | {"padding": padding(rows.lengths, batches)}


def _plain_steps(loss_of: TokenLoss, rows: Rows, updates: list[np.ndarray]) -> Any:
    model, optimizer = loss_of.model.train(), make_optimizer(loss_of, SETTINGS)
    for step, update in enumerate(updates):
        kept, total = int(rows.kept[update].sum()), 0.0
        for batch in in_order(update):
            starts, lengths = rows.offsets[:-1][batch], rows.lengths[batch]
            seen = np.arange(lengths.max()) < lengths[:, None]
            ids, attention, labels = (
                torch.from_numpy(array.astype(np.int64)).to(loss_of.device)
                for array in (
                    pad(rows.ids, starts, lengths),
                    seen,
                    np.where(seen, pad(rows.labels, starts, lengths), IGNORED),
                )
            )
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            (loss / kept).backward()
            total += loss.item() / kept
        take_step(optimizer, step, len(updates), SETTINGS)
        yield total
