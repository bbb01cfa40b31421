"""Per-token losses of the rows of a part, under one model. Needs no Ray.

Input: rows as flat arrays. Output: a loss for every token, 0 outside the response. The micro-batches depend on the
rows and the token budget alone, so that the same part gives the same bits wherever and whenever it is scored. Where
memory is short the part is scored with a smaller budget, which changes last bits: the footer of its file records it.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tokenclean_ray.batching import GPU_LEAST, budget_on, pad, plan_batches, rope_groups
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.models import ModelSpec, load_adapter, load_model, out_of_memory
from tokenclean_ray.schema import FLOATS, flat_lists, list_column, losses, statistics_of
from tokenclean_ray.token_loss import TokenLoss, token_loss_for


def score_table(
    loss_of: TokenLoss, encoded: pa.Table, batch_tokens: int, more: tuple[str, ...], where: str
) -> tuple[pa.Table, int]:
    """The losses of a part's rows, in its order; with half the budget as often as memory does not suffice.

    Args:
        loss_of: the model.
        encoded: columns row, input_ids, response_mask.
        batch_tokens: most tokens of a forward pass, padding included.
        more: what else is wanted, of `schema.STATISTICS`.
        where: what is scored, for the error.

    Returns:
        a table of `schema.losses`, and the budget that sufficed.

    Raises:
        UserError: memory does not suffice for the longest row alone, which needs most.
    """
    ids, offsets = flat_lists(encoded["input_ids"])
    mask, _ = flat_lists(encoded["response_mask"])
    while True:
        try:
            values = score_statistics(loss_of, ids, mask, offsets, batch_tokens, more)
            columns = [encoded["row"], *(list_column(flat, offsets, FLOATS) for flat in values)]
            return pa.table(columns, losses(more)), batch_tokens
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # out of the handler, since the exception holds on to the tensors of its frames
        longest = int(np.diff(offsets).max())
        if batch_tokens <= longest:
            raise UserError(
                f"scoring {where} runs out of memory with one row of {longest} tokens: lower data.max_length, "
                "start fewer actors (score.num_actors), hold one model at a time (score.colocate: false), or spread "
                "the model (score.gpus_per_actor)"
            )
        batch_tokens //= 2
        torch.cuda.empty_cache()


def score_statistics(
    loss_of: TokenLoss,
    ids: np.ndarray,
    mask: np.ndarray,
    offsets: np.ndarray,
    batch_tokens: int,
    more: tuple[str, ...] = (),
) -> np.ndarray:
    """The loss of every token of flat rows, and what else is wanted of it.

    Args:
        ids: token ids of all rows, one after another.
        mask: true for response tokens, same length.
        offsets: row i is [offsets[i], offsets[i + 1]).
        batch_tokens: most tokens of a forward pass, padding included.
        more: what else is wanted, of `schema.STATISTICS`.

    Returns:
        (1 + len(more), tokens) float32; 0 where the mask is false.
    """
    device = loss_of.device
    lengths = np.diff(offsets)
    groups = rope_groups(loss_of.model.config.get_text_config(), lengths)
    found = np.zeros((1 + len(more), len(ids)), np.float32)
    begun: list[tuple[np.ndarray, torch.Tensor]] = []  # the batch that a GPU computes while the next is made
    with torch.inference_mode():
        for rows in plan_batches(lengths, batch_tokens, groups, GPU_LEAST if device.type != "cpu" else 0):
            starts, row_lengths = offsets[:-1][rows], lengths[rows]
            ids_BT = torch.from_numpy(pad(ids, starts, row_lengths).astype(np.int64))
            target_BT = pad(mask, starts, row_lengths)
            row, column = np.nonzero(target_BT)
            _finish(begun, found)
            if groups[rows[0]] > 1:
                loss_of.forget_lengths()
            found_SN = loss_of.statistics(ids_BT.to(device), torch.from_numpy(target_BT), more)
            begun.append((starts[row] + column, found_SN))
        _finish(begun, found)
    return found


def _finish(begun: list[tuple[np.ndarray, torch.Tensor]], found: np.ndarray) -> None:
    """Wait for what was begun, and put it in its places."""
    while begun:
        at, found_SN = begun.pop()
        found[:, at] = found_SN.cpu().numpy()


class PartScorer:
    """Holds models and turns encoded/ into losses/<model>/, part by part. What a `score_actors.ScoringActor` runs."""

    def __init__(self, store: Store, models: list[tuple[ModelSpec, str]], dtype: str, score: Score, gpu: bool) -> None:
        """Load the models.

        Args:
            models: each with the folder of its losses.
            dtype: of the weights.
            gpu: on the visible GPUs; else on `score.cpus_per_actor` threads.

        Raises:
            UserError: a model gives NaN, cannot be scored in batches, or does not fit the memory.
        """
        if not gpu:
            # not as many as there are cores: a loss must not depend on how many actors share them
            torch.set_num_threads(score.cpus_per_actor)
        self._store, self._models = store, models
        self._batch_tokens = budget_on(gpu, score.batch_tokens)
        device = ("auto" if score.gpus_per_actor > 1 else "cuda") if gpu else "cpu"
        full = {spec.path: spec for spec, _ in models}
        try:
            self._loaded = {
                path: load_model(path, getattr(torch, dtype), device, spec.trusted, spec.revision)
                for path, spec in full.items()
            }
            self.losses = {folder: self._loss_of(spec) for spec, folder in models}
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"{', '.join(sorted(full))}: no memory to load into: set score.colocate: false to hold one model at "
                "a time, start fewer actors (score.num_actors), or spread the model (score.gpus_per_actor)"
            ) from error
        self._adapted = next((self._loaded[spec.adapter] for spec, _ in models if spec.adapter), None)

    def _loss_of(self, spec: ModelSpec) -> TokenLoss:
        if spec.adapter is None:
            return token_loss_for(self._loaded[spec.path])
        # the adapter lies over the base's own modules, and is switched off where the base is asked
        self._loaded[spec.adapter] = load_adapter(self._loaded[spec.path], spec.adapter)
        return token_loss_for(self._loaded[spec.adapter].get_base_model())

    def score(self, part: str, folders: list[str]) -> dict[str, Any]:
        """Score a part under the models of some folders and commit the losses.

        Every part begins with the budget that is configured, so that its losses do not depend on the parts before.

        Returns:
            `rows`; `full_logits`: the folders whose model needed them; `lowered`: the budget of those that had to do
            with less than the configured one.
        """
        encoded = self._store.read_part("encoded", part, ["row", "input_ids", "response_mask"])
        lowered = {}
        for spec, folder in self._models:
            if folder not in folders:
                continue
            with self._adapted.disable_adapter() if self._adapted and not spec.adapter else nullcontext():
                more, where = statistics_of(folder), f"{part}, {folder}"
                table, budget = score_table(self.losses[folder], encoded, self._batch_tokens, more, where)
            self._store.write_part(folder, part, table, {"rows": table.num_rows, "batch_tokens": budget})
            if budget < self._batch_tokens:
                lowered[folder] = budget
        full_logits = [folder for folder, loss in self.losses.items() if loss.full_logits]
        return {"rows": encoded.num_rows, "full_logits": full_logits, "lowered": lowered}
