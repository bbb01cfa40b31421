"""`tokenclean status`: how far a run is, or how it ended. Reads small files of the run folder, and needs no Ray.

Input: a run folder, anywhere. Output: a few lines.
"""

from typing import Any

from tokenclean_ray import lock
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import GOES_ON, Store
from tokenclean_ray.progress import speed
from tokenclean_ray.storage import absolute


def describe(url: str) -> str:
    """The lines; takes up to ten seconds where a run may have died.

    Raises:
        UserError: no run has been at work there.
    """
    store = Store(absolute(url))
    run = lock.newest(store)
    if run is None:
        raise UserError(f"{url} is no run folder: no run has been at work there")
    lines = [f"run       {store.url}", f"state     {_state(store, run)}"]
    if stage := run.get("stage"):
        lines.append(f"stage     {_stage(stage)}")
    record = store.read_json("run.json") or {}
    if result := record.get("result"):
        counts = record["counts"]
        lines.append(f"result    {result['path']}: {counts['masked']:,} of {counts['rows']:,} rows")
    return "\n".join(lines)


def _state(store: Store, run: dict[str, Any]) -> str:
    who = f"{run['command']}, process {run['pid']} on {run['host']}, since {run['since']}"
    if run.get("stopped"):
        return f"stopped ({who}); {GOES_ON}"
    if run.get("error"):
        return f"failed: {run['error']} ({who}); {GOES_ON}"
    if run.get("released"):
        return f"finished ({who})"
    if lock.alive(store, run):
        return f"running ({who})"
    return f"no sign of life ({who}); {GOES_ON}"


def _stage(stage: dict[str, Any]) -> str:
    """Name, parts, share, speed, time left."""
    wanted = f"{stage['parts_wanted']:,}" if stage["parts_wanted"] else "?"
    text = f"{stage['name']}, {stage['parts']:,} of {wanted} {stage.get('unit', 'parts')}"  # older ones have no unit
    if stage["rows"]:
        text += f", {stage['rows']:,} rows"
    if stage["tokens_wanted"] and stage["tokens"]:
        text += f", {stage['tokens'] / stage['tokens_wanted']:.0%} of the tokens"
    if stage.get("note"):
        text += f", {stage['note']}"
    return text + speed(stage)
