"""Fine-tuning on masked tokens: the plan of updates, the loss of one, the schedule. Needs no Ray.

Input: rows as flat arrays with labels (-100 where masked). An update's loss is the mean over its kept tokens
wherever they lie: the sum of token losses divided by their number over all workers and micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenclean_ray.batching import pad, plan_batches
from tokenclean_ray.token_loss import TokenLoss

IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """Training rows, one after another: row i is [offsets[i], offsets[i + 1])."""

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def kept(self) -> np.ndarray:
        """Trained tokens of each row; the first token of a row is never predicted."""
        trained = (self.labels != IGNORED).astype(np.int64)
        trained[self.offsets[:-1]] = 0
        return np.add.reduceat(trained, self.offsets[:-1])

    @classmethod
    def of(cls, rows: list[tuple[np.ndarray, np.ndarray]]) -> "Rows":
        """From (input_ids, labels) pairs."""
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
        return cls(np.concatenate([i for i, _ in rows]), np.concatenate([k for _, k in rows]), offsets)


def plan_updates(rows: int, batch_rows: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The row indices of every update: each epoch a seeded permutation, every row once, the last update smaller."""
    updates = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        updates += [order[at : at + batch_rows] for at in range(0, rows, batch_rows)]
    return updates


def learning_rate_at(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the first share of the steps, then linear to zero.

    Args:
        step: from 0.
    """
    warmup = max(1, round(warmup_ratio * steps))
    return peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def micro_batches(rows: Rows, update: np.ndarray, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded token ids and target masks of an update's rows, (B, T) each, by a token budget."""
    lengths = rows.lengths[update]
    for members in plan_batches(lengths, batch_tokens):
        starts = rows.offsets[update[members]]
        target_BT = pad((rows.labels != IGNORED), starts, lengths[members])
        target_BT[:, 0] = False
        yield (
            torch.from_numpy(pad(rows.ids, starts, lengths[members]).astype(np.int64)),
            torch.from_numpy(target_BT),
        )


def fit(
    loss_of: TokenLoss,
    rows: Rows,
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_rows: int = 48,
    batch_tokens: int = 16384,
    warmup_ratio: float = 0.03,
    max_grad_norm: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train a model in this process, AdamW without weight decay, linear schedule.

    Returns:
        the loss of every update, nats per kept token.
    """
    loss_of.train()
    parameters = [p for p in loss_of.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    updates = plan_updates(len(rows.lengths), batch_rows, epochs, seed)
    kept = rows.kept
    curve = []
    for step, update in enumerate(updates):
        total = int(kept[update].sum())
        if total == 0:
            continue
        sum_loss = 0.0
        for ids_BT, target_BT in micro_batches(rows, update, batch_tokens):
            loss = loss_of(ids_BT, target_BT).sum() / total
            loss.backward()
            sum_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(updates), learning_rate, warmup_ratio)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(sum_loss)
    loss_of.eval()
    return curve
