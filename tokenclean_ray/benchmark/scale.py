"""`tokenclean benchmark scale`: what a run costs as its rows grow, and what a second actor gains.

Input: how many rows at most. Output: figures. Models without a layer stand in for real ones, and rows are short: what
is measured is everything else, that is reading, encoding, Ray, files, the cut, the masks.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vl_convert

from tokenclean_ray.benchmark.clean import run_clean
from tokenclean_ray.benchmark.machine import machine
from tokenclean_ray.benchmark.workload import SIZE, VOCABULARY, Row, made_rows
from tokenclean_ray.config import Data

STAND_IN = {"hidden_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 2}
STAND_IN_VOCABULARY = 512
STAND_IN_LENGTH = 0.05  # of a row of GSM8K, but no question or answer has less than eight words
PART_BYTES = 1 << 18  # so that the fewest rows too are more parts than the driver takes on itself
FEWEST = 10_000
# of so many rows: starts vary by seconds, which are much of few rows; the median counts
RUNS = {10_000: 9, 100_000: 7, 1_000_000: 3}
ACTOR_ROWS = 4000  # parts for both


def measure(rows: int, **_: Any) -> dict[str, Any]:
    """Clean ten thousand rows, ten times as many, and so on, evenly mixed; then score with one actor and with two."""
    sizes = [FEWEST]
    while sizes[-1] * 10 <= rows:
        sizes.append(sizes[-1] * 10)
    record = machine("cpu")
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for size in _spread({size: RUNS.get(size, 1) for size in sizes}):
        short = _short_rows(size)
        found[size].append(_run(short, STAND_IN, STAND_IN_VOCABULARY, os.cpu_count() or 1, PART_BYTES))
    runs = {size: sorted(of, key=_seconds)[len(of) // 2] for size, of in found.items()}
    seconds = {size: _seconds(run) for size, run in runs.items()}
    per_row = {  # what more rows cost, without what does not depend on them
        f"{few}_to_{many}": (seconds[many] - seconds[few]) / (many - few) for few, many in itertools.pairwise(sizes)
    }
    longer = made_rows(ACTOR_ROWS, 0.5)
    actors = {n: _run(longer, SIZE, VOCABULARY, n, Data().part_bytes)["timings"]["actors"] for n in (1, 2)}
    return record | {
        "fixed_seconds": max(0.0, seconds[FEWEST] - FEWEST * next(iter(per_row.values()), 0.0)),
        "microseconds_per_row": {between: 1e6 * cost for between, cost in per_row.items()},
        "runs": runs,
        "seconds_of_each": {size: [round(_seconds(run), 3) for run in of] for size, of in found.items()},
        "gain_of_a_second_actor": 2 * actors[1] / actors[2],
    }


def _spread(runs: dict[int, int]) -> list[int]:
    """Each size as often as is said, evenly over the time, within which a machine's speed drifts by a tenth."""
    return [size for _, size in sorted(((turn + 0.5) / of, size) for size, of in runs.items() for turn in range(of))]


def _seconds(run: dict[str, Any]) -> float:
    return float(run["seconds"] - run["ray_start_seconds"])


def draw(found: dict[str, Any]) -> bytes:
    """A PNG: seconds by rows, and the memory of the driver and of an actor, both axes logarithmic."""
    runs = [(int(rows), run) for rows, run in found["runs"].items()]
    seconds = [{"rows": n, "seconds": _seconds(run)} for n, run in runs]
    memory = [{"rows": n, "of": of, "GB": run[f"{of}_memory"] / 1e9} for n, run in runs for of in ("driver", "actor")]
    rows = {"field": "rows", "type": "quantitative", "scale": {"type": "log"}, "axis": {"format": "~s", "tickCount": 4}}
    mark = {"type": "line", "point": True}
    time = {"field": "seconds", "type": "quantitative", "scale": {"type": "log"}, "title": "seconds of a run"}
    most = {"field": "GB", "type": "quantitative", "title": "most memory, GB"}
    panels = [
        {"data": {"values": seconds}, "mark": mark, "encoding": {"x": rows, "y": time}},
        {
            "data": {"values": memory},
            "mark": mark,
            "encoding": {"x": rows, "y": most, "color": {"field": "of", "title": None}},
        },
    ]
    chart = {"hconcat": [{"width": 260, "height": 200} | panel for panel in panels]}
    return vl_convert.vegalite_to_png(chart, scale=1.5)


def _short_rows(count: int) -> Iterator[Row]:
    for seed in range(count // FEWEST):
        yield from made_rows(FEWEST, STAND_IN_LENGTH, seed)


def _run(rows: Any, size: dict[str, int], vocabulary: int, actors: int, part_bytes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run_clean(Path(folder), rows, size, vocabulary, actors, used=True, device="cpu", part_bytes=part_bytes)
