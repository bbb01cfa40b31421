"""Fine-tuning on masked tokens: the plan of updates, the loss of one, the schedule. Needs no Ray.

Input: rows with labels (-100 where masked). An update's loss is the mean over its kept tokens wherever they lie: the
sum of token losses divided by their number over all workers and micro-batches. What a step does depends on the
settings, the step's number, the rank and the number of ranks alone, so that training resumes exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenclean_ray.batching import GPU_LEAST_TRAINING, budget_on, pad, plan_batches, rope_groups
from tokenclean_ray.config import Train
from tokenclean_ray.token_loss import NOTHING_BT, TokenLoss

IGNORED = -100


class TrainingRows(Protocol):
    """Rows that can be fetched by index; only two numbers a row are in memory."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""

    @property
    def kept(self) -> np.ndarray:
        """Trained tokens of each row, int64; a first token is never predicted."""

    def take(self, rows: np.ndarray) -> "Rows":
        """Some of the rows, in the order asked for."""


@dataclass(frozen=True)
class Rows:
    """Rows in memory, one after another: row i is [offsets[i], offsets[i + 1])."""

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def kept(self) -> np.ndarray:
        """Trained tokens of each row."""
        return count_kept(self.labels, self.offsets)

    @classmethod
    def of(cls, rows: list[tuple[np.ndarray, np.ndarray]]) -> "Rows":
        """From (input_ids, labels) pairs."""
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
        empty = [np.zeros(0, np.int32)]
        ids, labels = (np.concatenate(empty + [row[column] for row in rows]) for column in (0, 1))
        return cls(ids, labels, offsets)

    def take(self, rows: np.ndarray) -> "Rows":
        """Some of the rows, in the order asked for."""
        spans = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        return Rows.of([(self.ids[span], self.labels[span]) for span in spans])

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Padded token ids (int64) and target mask (bool) of some rows, both (B, T)."""
        starts, lengths = self.offsets[:-1][rows], self.lengths[rows]
        target_BT = pad(self.labels != IGNORED, starts, lengths)
        target_BT[:, 0] = False
        return torch.from_numpy(pad(self.ids, starts, lengths).astype(np.int64)), torch.from_numpy(target_BT)


def count_kept(labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Trained tokens of each flat row."""
    trained = np.append(labels != IGNORED, False).astype(np.int64)
    trained[offsets[:-1]] = 0
    return np.add.reduceat(trained, offsets[:-1]) if len(offsets) > 1 else np.zeros(0, np.int64)


def plan_updates(rows: int, batch_rows: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The row indices of every update: each epoch a seeded permutation, every row once, the last update smaller."""
    updates = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        updates += [order[at : at + batch_rows] for at in range(0, rows, batch_rows)]
    return updates


def deal(lengths: np.ndarray, update: np.ndarray, ranks: int) -> list[np.ndarray]:
    """An update's rows by rank: dealt by length, so that ranks get like work; every row goes to one."""
    by_length = update[np.argsort(-lengths[update], kind="stable")]
    return [by_length[rank::ranks] for rank in range(ranks)]


def learning_rate_at(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the first share of the steps, then linear to zero.

    Args:
        step: from 0.
    """
    warmup = max(1, round(warmup_ratio * steps))
    return peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def backward(
    loss_of: TokenLoss, rows: TrainingRows, update: np.ndarray, settings: Train, seed: list[int], rank: int, ranks: int
) -> float:
    """Add one update's gradient.

    Sharded backward passes average over ranks, so each loss is multiplied by their number; and every rank must make
    as many of them, so that ranks with fewer micro-batches make empty ones.

    Args:
        seed: what the randomness of this update follows from, with rank and micro-batch.

    Returns:
        this rank's share of the update's loss, nats per kept token; the shares of all ranks add up to it.
    """
    total = int(rows.kept[update].sum())
    dealt = deal(rows.lengths, update, ranks)
    device = loss_of.device
    budget = budget_on(device.type != "cpu", settings.batch_tokens)
    least = GPU_LEAST_TRAINING if device.type != "cpu" else 0
    groups = [rope_groups(loss_of.model.config.get_text_config(), rows.lengths[share]) for share in dealt]
    plans = [plan_batches(rows.lengths[share], budget, of, least) for share, of in zip(dealt, groups, strict=True)]
    remembers = any((of > 1).any() for of in groups)  # on any rank: all make the same passes
    mine = rows.take(dealt[rank])
    share_of_loss = 0.0
    for number in range(max(map(len, plans))):
        if remembers:
            loss_of.forget_lengths()
        torch.manual_seed(int(np.random.SeedSequence([*seed, rank, number]).generate_state(1)[0]))  # for dropout
        ids_BT, target_BT = mine.batch(plans[rank][number]) if number < len(plans[rank]) else NOTHING_BT
        loss = loss_of(ids_BT.to(device), target_BT.to(device)).sum() / total
        (loss * ranks).backward()
        share_of_loss += loss.item()
    return share_of_loss


def train_steps(
    loss_of: TokenLoss,
    optimizer: Any,
    rows: TrainingRows,
    settings: Train,
    *,
    seed: int,
    first_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[int, float, int]]:
    """Train from a step on; yields after each (step, this rank's share of its loss, kept tokens of all ranks).

    Updates without a kept token change nothing and are skipped.
    """
    updates = plan_updates(len(rows.lengths), settings.batch_rows, settings.epochs, seed)
    loss_of.train()
    for step in range(first_step, len(updates)):
        tokens = int(rows.kept[updates[step]].sum())
        share_of_loss = 0.0
        if tokens:
            share_of_loss = backward(loss_of, rows, updates[step], settings, [seed, step], rank, ranks)
            take_step(optimizer, step, len(updates), settings)
        yield step, share_of_loss, tokens
    loss_of.eval()


def take_step(optimizer: Any, step: int, steps: int, settings: Train) -> None:
    """Change what is trained by the gradients, clipped, at the rate of a step; forget them."""
    (group,) = optimizer.param_groups
    torch.nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm)
    group["lr"] = learning_rate_at(step, steps, settings.learning_rate, settings.warmup_ratio)
    optimizer.step()
    optimizer.zero_grad()


def make_optimizer(loss_of: TokenLoss, settings: Train) -> torch.optim.AdamW:
    """AdamW without weight decay over what is trained."""
    return torch.optim.AdamW(
        [p for p in loss_of.parameters() if p.requires_grad], lr=settings.learning_rate, weight_decay=0.0, fused=True
    )


def fit(loss_of: TokenLoss, rows: TrainingRows, settings: Train, seed: int = 0) -> list[float]:
    """Train a model in this process; returns the loss of every update, nats per kept token."""
    steps = train_steps(loss_of, make_optimizer(loss_of, settings), rows, settings, seed=seed)
    return [loss for _, loss, tokens in steps if tokens]
