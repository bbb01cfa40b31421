"""`tokenclean benchmark select`: the exact cut of many tokens in Parquet files. Needs no Ray.

Input: how many tokens. Output: figures, and beside them Python's sort of a tuple for each token.
"""

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean_ray import schema, selection
from tokenclean_ray.config import Select
from tokenclean_ray.layout import Store
from tokenclean_ray.memory import keep_freed_memory, process_memory
from tokenclean_ray.schema import list_column
from tokenclean_ray.tokens import COUNTED, part_tokens

PART_TOKENS = 1 << 20
ROW_TOKENS = 256
SORTED = 10**7  # tokens that Python sorts, of what selection is compared to
SELECT = Select(scorer="excess_loss", keep_ratio=0.6)
LOSSES = {"base": "base", "reference": "reference"}


def measure(tokens: int, **_: Any) -> dict[str, Any]:
    """Find the exact cut of random losses in Parquet files; beside it Python's sort of a tuple for each token."""
    workers = os.cpu_count() or 1
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, get_context("spawn"), keep_freed_memory) as pool,
    ):
        store = Store(folder)
        parts = [f"part-{number:016x}" for number in range(-(-tokens // PART_TOKENS))]
        sizes = [min(PART_TOKENS, tokens - number * PART_TOKENS) for number in range(len(parts))]
        list(pool.map(_make_part, [store] * len(parts), parts, sizes))
        read = 0

        def look(wanted: selection.Wanted | None, gathered: selection.Gathered, every: int) -> selection.Found:
            nonlocal read
            read += sum(sizes[::every])
            return selection.add_up(pool.map(partial(_look, store, wanted, gathered), parts[::every]))

        began = time.perf_counter()
        cut = selection.find_cuts(look, [SELECT.ratio])["", SELECT.ratio]
        seconds = time.perf_counter() - began
        peak = sum(pool.map(_worker_memory, range(workers))) + process_memory()
    sorted_s = _sort_tuples(min(tokens, SORTED))
    return {
        "tokens": tokens,
        "workers": workers,
        "passes": read / tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "kept": cut.k,
        "peak_memory": peak,
        "sort_tokens": min(tokens, SORTED),
        "sort_tokens_per_s": min(tokens, SORTED) / sorted_s,
        "times_sort": tokens / seconds / (min(tokens, SORTED) / sorted_s),
    }


def _make_part(store: Store, part: str, tokens: int) -> None:
    random = np.random.default_rng(int(part[5:], 16))
    offsets = np.append(np.arange(0, tokens, ROW_TOKENS), tokens)
    row = pa.array(range(len(offsets) - 1), pa.int32())
    mask = np.ones(tokens, bool)
    mask[offsets[:-1]] = False
    columns = {"row": row, "source": pa.array([""] * len(row))}
    columns |= {"response_mask": list_column(mask, offsets, schema.FLAGS)}
    store.write_part("encoded", part, pa.table(columns), {})
    for model, scale in (("base", 2.0), ("reference", 1.5)):
        loss = list_column(random.exponential(scale, tokens).astype(np.float32), offsets, schema.FLOATS)
        store.write_part(model, part, pa.table({"row": row, "loss": loss}), {})


def _look(store: Store, wanted: selection.Wanted | None, gathered: selection.Gathered, part: str) -> selection.Found:
    return part_tokens(store, part, LOSSES, SELECT, COUNTED).look("global", wanted, gathered)


def _worker_memory(_: int) -> int:
    time.sleep(0.1)  # so that each worker takes one
    return process_memory()


def _sort_tuples(tokens: int) -> float:
    """Seconds that the obvious way takes: (score, row, position) of every token, sorted, the top share taken."""
    scores = np.random.default_rng(0).normal(size=tokens).tolist()
    began = time.perf_counter()
    ranked = sorted(((score, n // ROW_TOKENS, n % ROW_TOKENS) for n, score in enumerate(scores)), reverse=True)
    set(ranked[: int(SELECT.ratio * tokens)])
    return time.perf_counter() - began
