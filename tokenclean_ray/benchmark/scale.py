"""`tokenclean benchmark scale`: what a run costs as its rows grow, and what a second actor gains.

Input: how many rows at most. Output: figures. Models that compute next to nothing stand in for real ones, so that what
is measured is everything else: reading, encoding, Ray, files, the cut, the masks.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenclean_ray.benchmark.clean import run_clean
from tokenclean_ray.benchmark.machine import machine
from tokenclean_ray.benchmark.workload import SIZE, VOCABULARY, Row, made_rows

STAND_IN = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
STAND_IN_VOCABULARY = 512
STAND_IN_LENGTH = 0.05  # of a row of GSM8K, and no less than eight words a side
FEWEST = 10_000
ACTOR_ROWS = 3000  # parts for both


def measure(rows: int, **_: Any) -> dict[str, Any]:
    """Clean ten thousand rows, ten times as many, and so on; then score with one actor and with two."""
    sizes = [FEWEST]
    while sizes[-1] * 10 <= rows:
        sizes.append(sizes[-1] * 10)
    runs = {size: _run(_short_rows(size), STAND_IN, STAND_IN_VOCABULARY) for size in sizes}
    seconds = {size: run["seconds"] - run["ray_start_seconds"] for size, run in runs.items()}
    between = {
        f"{few}_to_{many}": 1e6 * (seconds[many] - seconds[few]) / (many - few)
        for few, many in itertools.pairwise(sizes)
    }
    actors = {n: _run(made_rows(ACTOR_ROWS, 0.4), SIZE, VOCABULARY, n)["timings"]["actors"] for n in (1, 2)}
    return machine("cpu") | {
        "fixed_seconds": max(0.0, seconds[FEWEST] - FEWEST * between[f"{FEWEST}_to_{FEWEST * 10}"] / 1e6)
        if between
        else seconds[FEWEST],
        "microseconds_per_row": between,
        "runs": runs,
        "gain_of_a_second_actor": 2 * actors[1] / actors[2],
    }


def _short_rows(count: int) -> Iterator[Row]:
    for seed in range(count // FEWEST):
        yield from made_rows(FEWEST, STAND_IN_LENGTH, seed)


def _run(rows: Any, size: dict[str, int], vocabulary: int, actors: int | str = "auto") -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run_clean(Path(folder), rows, size, vocabulary, actors)
