"""Per-token losses of the rows of a part, under one model. Needs no Ray.

Input: rows as flat arrays. Output: a loss for every token, 0 outside the response. The micro-batches depend on the
rows alone, so that the same part gives the same bits wherever and whenever it is scored.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tokenclean_ray.batching import pad, plan_batches
from tokenclean_ray.schema import LOSSES
from tokenclean_ray.token_loss import TokenLoss

CPU_BATCH_TOKENS = 4096  # measured: 70 % of the matmul peak; 51 % at twice as many


def flat_lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (values, offsets): row i is values[offsets[i]:offsets[i + 1]]."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]], offsets - offsets[0]


def list_column(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.Array:
    """The reverse of `flat_lists`."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind.value_type), type=kind)


def score_table(loss_of: TokenLoss, encoded: pa.Table, batch_tokens: int) -> pa.Table:
    """The losses of a part's rows, in its order.

    Args:
        loss_of: the model.
        encoded: columns row, input_ids, response_mask.
        batch_tokens: most tokens of a forward pass, padding included.

    Returns:
        a table of `schema.LOSSES`.
    """
    ids, offsets = flat_lists(encoded["input_ids"])
    mask, _ = flat_lists(encoded["response_mask"])
    losses = score_rows(loss_of, ids, mask, offsets, batch_tokens)
    return pa.table({"row": encoded["row"], "loss": list_column(losses, offsets, LOSSES.field("loss").type)}, LOSSES)


def score_rows(
    loss_of: TokenLoss, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray, batch_tokens: int
) -> np.ndarray:
    """The loss of every token of flat rows, float32, nats; 0 where the mask is false.

    Args:
        ids: token ids of all rows, one after another.
        mask: true for response tokens, same length.
        offsets: row i is [offsets[i], offsets[i + 1]).
        batch_tokens: most tokens of a forward pass, padding included.
    """
    device = loss_of.model.get_input_embeddings().weight.device
    if device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS)
    lengths = np.diff(offsets)
    groups = rope_groups(loss_of.model.config.get_text_config(), lengths)
    losses = np.zeros(len(ids), np.float32)
    with torch.inference_mode():
        for rows in plan_batches(lengths, batch_tokens, groups):
            starts, row_lengths = offsets[:-1][rows], lengths[rows]
            if groups[rows[0]] > 1:
                # dynamic RoPE remembers the longest row so far; a short row makes it forget
                loss_of.body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
            target_BT = pad(mask, starts, row_lengths)
            loss_N = loss_of(
                torch.from_numpy(pad(ids, starts, row_lengths).astype(np.int64)).to(device),
                torch.from_numpy(target_BT).to(device),
            )
            row, column = np.nonzero(target_BT)
            losses[starts[row] + column] = loss_N.cpu().numpy()
    return losses


def rope_groups(config: Any, lengths: np.ndarray) -> np.ndarray:
    """Rows that may share a batch have the same group.

    Long-context RoPE changes the frequencies of a whole batch by its longest row: longrope where that passes the
    original context, dynamic at every length beyond it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind == "longrope" and original:
        return (lengths > original).astype(np.int64)
    if kind == "dynamic":
        original = original or config.max_position_embeddings
        return np.where(lengths > original, lengths, 0).astype(np.int64)
    return np.zeros(len(lengths), np.int64)
