"""Rows → micro-batches by a token budget. The plan depends on the lengths alone, so losses are reproducible."""

import numpy as np

CPU_BATCH_TOKENS = 2048  # measured: 1,024 to 4,096 differ by little; more do not fit the caches
MOST_PADDING = 0.02  # of a batch's own tokens, once it is large enough to be computed well


def plan_batches(lengths: np.ndarray, budget: int, groups: np.ndarray | None = None) -> list[np.ndarray]:
    """Group rows of similar length so that rows × longest row stays within a budget.

    A batch ends earlier, from an eighth of the budget on, where the next row would pad it by more than `MOST_PADDING`:
    few rows of many lengths, such as an update's, would else be a quarter padding.

    Args:
        lengths: tokens of each row, shape (rows,).
        budget: most tokens of a batch, padding included; a longer row stands alone.
        groups: rows of different groups never share a batch.

    Returns:
        arrays of row indices, short rows first; every row is in exactly one.
    """
    if groups is None:
        groups = np.zeros(len(lengths), np.int64)
    order = np.lexsort((lengths, groups))  # stable: equal rows stay in order
    batches = []
    begin = tokens = 0
    for end in range(1, len(order) + 1):
        tokens += lengths[order[end - 1]]
        if end < len(order) and groups[order[end]] == groups[order[begin]]:
            longest = lengths[order[end]]
            padded = longest * (end + 1 - begin)
            alike = padded <= (1 + MOST_PADDING) * (tokens + longest)
            if padded <= budget and (alike or tokens < budget // 8):
                continue
        batches.append(order[begin:end])
        begin, tokens = end, 0
    return batches


def budget_on(gpu: bool, batch_tokens: int) -> int:
    """The budget of a forward pass where `batch_tokens` is configured."""
    return batch_tokens if gpu else min(batch_tokens, CPU_BATCH_TOKENS)


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
