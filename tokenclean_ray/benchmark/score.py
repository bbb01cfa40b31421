"""`tokenclean benchmark score`: scoring as the actors of a run do it, without Ray.

Input: a workload. Output: figures; with `baseline`, beside them what people write first, on the same rows.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from tokenclean_ray.batching import GPU_LEAST, budget_on, pad
from tokenclean_ray.benchmark.machine import (
    add_baselines,
    alone,
    device_here,
    dtype_on,
    machine,
    memory,
    processes,
    wait,
)
from tokenclean_ray.benchmark.workload import LENGTH, Workload, in_order, padding, planned, prepare, read_rows
from tokenclean_ray.config import Score
from tokenclean_ray.layout import Store
from tokenclean_ray.models import describe
from tokenclean_ray.schema import flat_lists
from tokenclean_ray.score import PartScorer

LOSSES = "losses/m"
TIMED_ROWS = 300  # of what people write first, whose cost is linear, but for cuDNN's plans


def measure(data: str | None, rows: int, baseline: bool, models: list[str], long: bool, **_: Any) -> dict[str, Any]:
    """Score rows under a random Llama of a size, see `workload.size_of`, with an actor for each core, or on one GPU."""
    size = " ".join(models)  # which is none, where there are two
    device = device_here()
    record = machine(device)
    workers = 1 if device == "cuda" else record["cores"]
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(Path(folder), read_rows(data, rows, long), workers, size)
        record |= work.figures | {"model": size, "workers": workers}
        ours = _as_actors(work, workers, device)
        record["ours"] = _figures(ours, work, record["matmul_flops"])
        if baseline:
            first = work.first(TIMED_ROWS)
            tables = [work.store.read_part(LOSSES, part, ["loss"]) for part in work.parts]
            losses = np.concatenate([flat_lists(table["loss"])[0] for table in tables])[: len(first.ids)]

            def written_first(cudnn: bool) -> dict[str, Any]:
                plain, expected = alone(as_written_first, first, device, cudnn)
                difference = float(np.abs(losses - expected)[first.mask].max())
                return _figures(plain, first, record["matmul_flops"]) | {"difference": difference}

            add_baselines(record, device, written_first)
    return record


def _figures(measured: dict[str, Any], work: Workload, peak: float) -> dict[str, Any]:
    seconds = measured["seconds"]
    return measured | {
        "tokens_per_s": len(work.ids) / seconds,
        "useful_flops": work.flops / seconds,
        "share_of_peak": work.flops / seconds / peak,
    }


# -- ours --------------------------------------------------------------------------------------------------------


def _as_actors(work: Workload, workers: int, device: str) -> dict[str, Any]:
    """Each process holds the model and scores parts from file to file, as an actor does."""
    budget = budget_on(device == "cuda", Score().batch_tokens)
    ready = processes.Barrier(workers + 1)
    begin = (work.store, work.model, device, ready)
    with ProcessPoolExecutor(workers, processes, initializer=_begin, initargs=begin) as pool:
        done = [pool.submit(_score_part, part) for part in work.parts]
        with contextlib.suppress(BrokenBarrierError):  # a worker failed to start: its error is the first result
            ready.wait()
        began = time.perf_counter()
        results = [future.result() for future in done]
        seconds = time.perf_counter() - began
    spent = {"encode": work.encode_s}
    spent |= {name: sum(result["spent"][name] for result in results) for name in results[0]["spent"]}
    busy = sum(result["seconds"] for result in results) + work.encode_s
    return {
        "seconds": seconds,
        "padding": padding(work.lengths, planned(work.lengths, work.part_rows(), budget, GPU_LEAST)),
        "peak_memory": sum({result["worker"]: result["memory"] for result in results}.values()),
        "bytes_written": sum(file.stat().st_size for file in Path(work.store.url, LOSSES).iterdir()),
        "share_of_time": {name: seconds / busy for name, seconds in spent.items()}
        | {"batches_and_the_rest": 1 - sum(spent.values()) / busy},
    }


_spent: dict[str, float] = {}
"""Seconds of a worker by what it did."""
_events: list[tuple[str, Any, Any]] = []
"""What its GPU did, from one event to another."""
_scorer: PartScorer


class _TimedStore(Store):
    def read_part(self, *arguments: Any) -> Any:
        with _timing("read"):
            return super().read_part(*arguments)

    def write_part(self, *arguments: Any) -> None:
        with _timing("write"):
            super().write_part(*arguments)


@contextlib.contextmanager
def _timing(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    _spent[name] = _spent.get(name, 0.0) + time.perf_counter() - began


def _timed(name: str, device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        if device == "cpu":
            with _timing(name):
                return function(*arguments)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # a GPU is not waited for
        begin.record()
        found = function(*arguments)
        end.record()
        _events.append((name, begin, end))
        return found

    return timed


def _begin(store: Store, model: str, device: str, ready: Any) -> None:
    global _scorer
    try:
        models = [(describe(model), LOSSES)]
        _scorer = PartScorer(_TimedStore(store.url), models, dtype_on(device), Score(), device == "cuda")
    except BaseException:
        ready.abort()  # the others, and the one that starts the clock, would wait for ever
        raise
    loss_of: Any
    for loss_of in _scorer.losses.values():
        ids_BT = torch.zeros(1, LENGTH, dtype=torch.int64, device=loss_of.device)
        with torch.inference_mode():
            loss_of(ids_BT, torch.arange(LENGTH, device=loss_of.device)[None] > 0)  # first calls cost more
        loss_of._states = _timed("forward", device, loss_of._states)
        loss_of._head = _timed("head", device, loss_of._head)
    ready.wait()


def _score_part(part: str) -> dict[str, Any]:
    _spent.clear()
    began = time.perf_counter()
    _scorer.score(part, [LOSSES])
    for name, begin, end in _events:
        _spent[name] = _spent.get(name, 0.0) + begin.elapsed_time(end) / 1000
    _events.clear()
    return {
        "seconds": time.perf_counter() - began,
        "spent": dict(_spent),
        "worker": os.getpid(),
        "memory": memory(device_here()),
    }


# -- what people write first -------------------------------------------------------------------------------------


def as_written_first(work: Workload, device: str, cudnn: bool) -> tuple[dict[str, Any], np.ndarray]:
    """Rows in order, each batch padded to its longest, an attention mask, full logits, the loss of every position.

    Args:
        cudnn: see `machine.baselines`.

    Returns:
        `seconds`, `padding` and `peak_memory`, and the loss of every token.
    """
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    dtype = getattr(torch, dtype_on(device))
    model = LlamaForCausalLM.from_pretrained(work.model, dtype=dtype).to(device).eval()
    batches = in_order(np.arange(len(work.lengths)))
    _losses(model, work, batches[:2])  # first calls cost more
    wait(device)
    began = time.perf_counter()
    losses = _losses(model, work, batches)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "padding": padding(work.lengths, batches), "peak_memory": memory(device)}, losses


def _losses(model: Any, work: Workload, batches: list[np.ndarray]) -> np.ndarray:
    losses = np.zeros(len(work.ids), np.float32)
    with torch.no_grad():
        for rows in batches:
            starts, lengths = work.offsets[:-1][rows], work.lengths[rows]
            seen = np.arange(lengths.max()) < lengths[:, None]
            batch = torch.from_numpy(pad(work.ids, starts, lengths).astype(np.int64)).to(model.device)
            attention = torch.from_numpy(seen.astype(np.int64)).to(model.device)
            logits = model(input_ids=batch, attention_mask=attention, use_cache=False).logits
            found = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
            )
            row, column = np.nonzero(seen[:, 1:])
            losses[starts[row] + column + 1] = found.cpu().numpy().reshape(seen[:, 1:].shape)[row, column]
    return losses
