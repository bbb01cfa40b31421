"""`tokenclean benchmark precision`: what half precision changes, in losses and in which tokens are kept.

Input: rows and two models, or random ones. Output: for each precision tokens/s, and against float32 the losses'
differences and the share of tokens that are kept by one and not by the other. Needs no Ray.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenclean_ray.batching import budget_on
from tokenclean_ray.benchmark.machine import alone, device_here, machine, wait
from tokenclean_ray.benchmark.workload import Workload, make_model, prepare, read_rows, size_of
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.models import load_model
from tokenclean_ray.score import score_statistics
from tokenclean_ray.selection import keep_per_row, order_key
from tokenclean_ray.token_loss import token_loss_for

EXACT, HALVES = "float32", ("bfloat16", "float16")
PUBLISHED = "bfloat16"  # the weights of new models, as of most that are published: what is rounded is the arithmetic
RATIO = 0.6


def measure(data: str | None, rows: int, models: list[str], long: bool, **_: Any) -> dict[str, Any]:
    """Score rows under a base and a reference in each precision.

    Args:
        models: a size, see `workload.size_of`, of two random models, or the folders of base and reference.

    Raises:
        UserError: one folder alone, no such size, or a model that cannot be loaded.
    """
    if len(models) == 1 and Path(models[0]).is_dir():
        raise UserError(f"--models {models[0]}: name two folders, base and reference")
    device = device_here()
    record = machine(device)
    with tempfile.TemporaryDirectory() as folder:
        texts = read_rows(data, rows, long)
        work = prepare(Path(folder), texts, 1, models[0], dtype=PUBLISHED)
        reference = models[1] if models[1:] else str(Path(folder) / "reference")
        if not models[1:]:
            make_model(Path(reference), texts, *size_of(models[0]), seed=1, dtype=PUBLISHED)
        record |= work.figures | {"models": " and ".join(Path(model).name for model in models)}
        found = {dtype: alone(_losses, work, [work.model, reference], dtype, device) for dtype in (EXACT, *HALVES)}
    exact, slow = found[EXACT]
    for dtype, (losses, seconds) in found.items():
        record[dtype] = {"tokens_per_s": 2 * len(work.ids) / seconds}
        if dtype != EXACT:
            record[dtype] |= {
                "times_float32": slow / seconds,
                "mean_difference": float(np.abs(losses - exact).mean()),
                "largest_difference": float(np.abs(losses - exact).max()),
                "share_kept_otherwise": float((_kept(losses) != _kept(exact)).mean()),
            }
    return record


def _losses(work: Workload, models: list[str], dtype: str, device: str) -> tuple[np.ndarray, float]:
    """(models, response tokens) float32, nats; and the seconds that scoring took, loading left out."""
    found, seconds = [], 0.0
    for path in models:
        loss_of = token_loss_for(load_model(path, getattr(torch, dtype), device))
        budget = budget_on(device == "cuda", Score().batch_tokens)
        wait(device)
        began = time.perf_counter()
        (losses,) = score_statistics(loss_of, work.ids, work.mask, work.offsets, budget)
        seconds += time.perf_counter() - began
        found.append(losses[work.mask])
        del loss_of  # two models in float32 may not fit
    return np.stack(found), seconds


def _kept(losses: np.ndarray) -> np.ndarray:
    """The tokens of the highest excess losses, base minus reference; ties go by their order."""
    key = order_key(losses[0] - losses[1])
    return keep_per_row(key, np.arange(len(key), dtype=np.uint64), np.zeros(len(key), np.int32), RATIO)
