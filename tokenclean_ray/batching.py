"""Rows → micro-batches by a token budget. The plan depends on the lengths alone, so losses are reproducible."""

from typing import Any

import numpy as np

CPU_BATCH_TOKENS = 2048  # measured: 1,024 to 4,096 differ by little; more do not fit the caches
# what a batch costs by itself, of the budget: training on two cores is fastest with 32 to 128 tokens of 2,048; an H200
# takes for a batch of 16,384 what it takes for 200 more where shapes repeat (where they did not it may have been 2,000)
BATCH_COST = 1 / 64
# tokens: on an H200 fewer take as long, since kernels are not started faster; 1B, forward passes and LoRA's both passes
GPU_LEAST, GPU_LEAST_TRAINING = 2048, 8192


def plan_batches(
    lengths: np.ndarray, budget: int, groups: np.ndarray | None = None, least: int = 0
) -> list[np.ndarray]:
    """Group rows by length so that the work is least: padded tokens, and what each batch costs by itself.

    Sorted by length, the best plan of the first n rows is the best one of fewer rows, and one batch more.

    Args:
        lengths: tokens of each row, shape (rows,).
        budget: most tokens of a batch, padding included; a longer row stands alone.
        groups: rows of different groups never share a batch.
        least: tokens; a batch of fewer takes as long as one of these.

    Returns:
        arrays of row indices, of each group short rows first; every row is in exactly one.
    """
    if groups is None:
        groups = np.zeros(len(lengths), np.int64)
    order = np.lexsort((lengths, groups))  # stable: equal rows stay in order
    groups, longest = groups[order], lengths[order]
    starts = np.searchsorted(groups, groups)  # of each row's group
    firsts = np.maximum(starts, np.arange(1, len(order) + 1) - np.maximum(1, budget // longest))
    cost = int(budget * BATCH_COST)
    least_work = np.zeros(len(order) + 1, np.int64)  # of the first n rows
    begins = np.zeros(len(order) + 1, np.int64)  # where their last batch begins
    for n, (first, length) in enumerate(zip(firsts.tolist(), longest.tolist(), strict=True), 1):
        work = least_work[first:n] + np.maximum(least, length * np.arange(n - first, 0, -1))
        begin = int(work.argmin())
        least_work[n], begins[n] = work[begin] + cost, first + begin
    batches = []
    end = len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def rope_groups(config: Any, lengths: np.ndarray) -> np.ndarray:
    """Rows that may share a batch have the same group.

    Long-context RoPE changes the frequencies of a whole batch by its longest row: longrope where that passes the
    original context, dynamic at every length that reaches it (one that just does resets no frequencies of longer ones).
    """
    kind, original = rope_scaling(config)
    if kind == "longrope":
        return (lengths > original).astype(np.int64)
    if kind == "dynamic":
        return np.where(lengths >= original, lengths, 0).astype(np.int64)
    return np.zeros(len(lengths), np.int64)


def rope_scaling(config: Any) -> tuple[str, int]:
    """The kind of a text model's RoPE scaling, such as default, and how many tokens it had positions for before."""
    rope = getattr(config, "rope_parameters", None) or {}
    name = "original_max_position_embeddings"
    original = rope.get(name, 0) or getattr(config, name, 0) or getattr(config, "max_position_embeddings", 0)
    return rope.get("rope_type", "default"), original


def budget_on(gpu: bool, batch_tokens: int, most: int = CPU_BATCH_TOKENS) -> int:
    """The budget of a forward pass where `batch_tokens` is configured; `most`: of a CPU."""
    return batch_tokens if gpu else min(batch_tokens, most)


def pad(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows of a flat array as one right-padded array (rows, longest); padding is 0.

    Args:
        flat: the values of all rows, one after another.
        starts: index in `flat` of each wanted row's first value.
        lengths: how many values each wanted row has.
    """
    column = np.arange(lengths.max())
    index = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
    return np.where(column < lengths[:, None], flat[index], flat.dtype.type(0))
