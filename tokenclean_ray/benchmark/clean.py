"""`tokenclean benchmark clean`: a whole run with two models, Ray's start included, and what people write first.

Input: rows of a file, or made ones. Output: figures. The run has a process of its own, whose memory is the driver's.
"""

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenclean_ray.benchmark.machine import add_baselines, alone, device_here, machine, memory
from tokenclean_ray.benchmark.score import TIMED_ROWS, as_written_first
from tokenclean_ray.benchmark.workload import SIZE, TOKENIZER_ROWS, VOCABULARY, make_model, prepare, read_rows
from tokenclean_ray.config import Data


def measure(data: str | None, rows: int, baseline: bool, **_: Any) -> dict[str, Any]:
    """Clean rows with a base and a reference."""
    device = device_here()
    texts = read_rows(data, rows)
    record = machine(device) | {"rows": len(texts)}
    with tempfile.TemporaryDirectory() as folder:
        record["ours"] = run_clean(Path(folder), texts, SIZE, VOCABULARY)
        if baseline:
            # all rows, for a vocabulary as large
            work = prepare(Path(folder) / "baseline", texts, 1).first(TIMED_ROWS)

            def written_first(cudnn: bool) -> dict[str, Any]:
                plain = alone(as_written_first, work, device, cudnn)[0]
                return {"tokens_per_s": len(work.ids) / plain["seconds"] / 2}  # two models

            add_baselines(record, device, written_first)
    return record


def run_clean(
    folder: Path,
    rows: Iterable[dict[str, Any]],
    size: dict[str, int],
    vocabulary: int,
    actors: int | str = "auto",
    used: bool = False,
    device: str = "auto",
    part_bytes: int = Data().part_bytes,
) -> dict[str, Any]:
    """Clean rows in a process of its own, on a Ray of its own.

    Args:
        folder: an empty one, for the models, the rows and the run.
        size: of the models.
        actors: how many score.
        used: that Ray has run Ray Data before, as a running cluster has, whose own actors start once in its life.
        device: model.device.
        part_bytes: data.part_bytes.
    """
    first: list[dict[str, Any]] = []
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            if len(first) < TOKENIZER_ROWS:
                first.append(row)
    for seed, name in enumerate(("base", "reference")):
        make_model(folder / name, first, size, vocabulary, seed)
    values = {
        "output": str(folder / "run"),
        "model": {name: str(folder / name) for name in ("base", "reference")} | {"device": device},
        "data": {"path": [str(folder / "rows.jsonl")], "template": "tulu", "part_bytes": part_bytes},
        "score": {"num_actors": actors},
    }
    return alone(_clean, values, used)


def _clean(values: dict[str, Any], used: bool) -> dict[str, Any]:
    import ray

    from tokenclean_ray import rounds, workers
    from tokenclean_ray.config_file import build_config

    began = time.perf_counter()
    workers.connect()
    if used:
        ray.data.range(1).map(lambda row: row).materialize()
    connected = time.perf_counter()
    record = rounds.clean(build_config(values, "clean"))
    seconds = time.perf_counter() - began
    tokens = record["counts"]["tokens"]
    kind = "GPU" if workers.on_gpu(values["model"]["device"]) else "CPU"
    actors = record["scoring"]["actor_seconds"] / ray.cluster_resources()[kind]
    parts = {name.removesuffix("_s"): taken for name, taken in record["timings"].items()}
    parts |= {"ray_start": connected - began, "score": actors, "score_wait": parts["score"] - actors}
    return {
        "seconds": seconds,
        "ray_start_seconds": connected - began,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "driver_memory": memory("cpu"),
        "actor_memory": record["scoring"]["actor_memory"],
        "written_bytes": sum(file.stat().st_size for file in Path(values["output"]).rglob("*") if file.is_file()),
        "timings": record["timings"] | {"actors": record["scoring"]["actor_seconds"]},
        "share_of_time": {name: taken / seconds for name, taken in parts.items()},
    }
