"""What `tokenclean benchmark` does with the figures: append a record, print a table."""

import json
import os
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenclean_ray import __version__

UNITS = {
    "flops": ("GFLOP/s", 1e9),
    "memory": ("GB", 1e9),
    "share": ("%", 0.01),
    "padding": ("%", 0.01),
    "copy": ("GB/s", 1e9),
    "disk": ("GB/s", 1e9),
    "bytes": ("MB", 1e6),
    "microseconds": ("µs", 1),
    "seconds": ("s", 1),
    "times": ("times", 1),
}
"""Part of a figure's name → its unit, and what it is divided by; the first that fits."""


def run(what: str, record: str, data: str | None, **settings: Any) -> None:
    """Measure, append the record, print it; a benchmark that has a figure draws it beside the record.

    Args:
        what: the module here whose `measure` takes what it needs of `data` and the settings.
        record: a file of JSON lines.
        data: a file of rows, or None.
    """
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' too, here and in the processes to come
    module = import_module(f"tokenclean_ray.benchmark.{what}")  # the one alone: select's memory is without torch's
    versions = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    versions["tokenclean-ray"] = __version__  # which need not be installed
    found = module.measure(data=data, **settings)
    line = {"benchmark": what, "data": data and Path(data).name, "versions": versions, **found}
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if hasattr(module, "draw"):
        Path(record).with_name(f"{what}.png").write_bytes(module.draw(found))
    table = Table("", box=None, header_style="bold")
    table.add_column("", justify="right")
    for name, figure in _flat("", found):
        table.add_row(name, figure)
    Console(highlight=False).print(table)


def _flat(above: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in found.items():
        full = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(value, dict):
            rows += _flat(f"{full}: ", value)
        elif value is not None:
            rows.append((full, _shown(full, value)))
    return rows


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(_shown(name, one) for one in value)
    unit, scale = next((unit for key, unit in UNITS.items() if key in name), ("", 1))
    number = value / scale
    whole = number >= 1000 or (isinstance(value, int) and scale == 1)
    return f"{number:{',.0f' if whole else '.3g'}} {unit}".strip()
