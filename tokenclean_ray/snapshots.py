"""Published masked datasets: masked/v0001 …, each complete before it is named, never changed afterwards.

Input: a run and a selection whose rows are masked. Output: the snapshot's claim.json, changes.json and manifest.json,
and masked/latest.json.
"""

import json
import math
import time
from typing import Any

from tokenclean_ray import changes, metrics, pipeline
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Damaged
from tokenclean_ray.masking import Selection
from tokenclean_ray.progress import say
from tokenclean_ray.run import Run, Summaries
from tokenclean_ray.storage import side_by_side


def claim_snapshot(run: Run, name: str) -> str:
    """The snapshot of a selection, v0001 …: a new one, or the one that it had before.

    The claim is the snapshot's first file and never replaced, so that a resumed run goes on in the same folder and no
    other selection gets into it.
    """
    taken = [folder for folder in run.store.names("masked") if folder[:1] == "v" and folder[1:].isdigit()]
    claims = side_by_side(lambda snapshot: run.store.read_json(f"masked/{snapshot}/claim.json") or {}, taken)
    for snapshot, found in zip(taken, claims, strict=True):
        if found.get("selection") == name:
            return snapshot
    newest = (run.store.read_json("masked/latest.json") or {}).get("snapshot", "v0")  # its folder may have been deleted
    number = max(int(folder[1:]) for folder in (newest, *taken)) + 1
    claim = json.dumps({"selection": name}).encode()
    while not run.store.create_bytes(f"masked/v{number:04d}/claim.json", claim):
        number += 1
    return f"v{number:04d}"


def finish_snapshot(run: Run, snapshot: str, name: str, parts: list[str]) -> None:
    """Mark a snapshot complete, then make it the newest.

    Raises:
        UserError: another run took over, or wrote another selection to the same snapshot.
    """
    run.lock.check()
    claim = run.store.read_json(f"masked/{snapshot}/claim.json")
    if claim != {"selection": name}:
        raise UserError(f"{run.store.url}/masked/{snapshot} is now another run's: delete it and run again, alone")
    manifest = {"selection": name, "parts": parts, "tokenizer": run.tokenizer, "template": run.config.data.template}
    run.store.write_json(f"masked/{snapshot}/manifest.json", manifest)
    run.store.write_json("masked/latest.json", {"snapshot": snapshot, "selection": name})


def changes_since(run: Run, snapshot: str, chosen: Selection, pool: Summaries) -> dict[str, Any] | None:
    """What a snapshot that is about to be published changes to the newest one; None where there is none.

    Returns:
        contents of changes.json: `since`, the counts of `changes.COUNTS`, and `drift`, the `changes.distance` of the
        scores of new rows from those of unchanged rows, None where either are missing.
    """
    file = f"masked/{snapshot}/changes.json"
    latest = run.store.read_json("masked/latest.json") or {"snapshot": snapshot}
    if latest["snapshot"] == snapshot or run.store.read_json(f"masked/{snapshot}/manifest.json"):
        if latest["snapshot"] != snapshot:
            say(f"{snapshot} is the newest again: input and selection are what they were, and so is its changes.json")
        return run.store.read_json(file)
    before = f"masked/{latest['snapshot']}"
    manifest = run.store.read_json(f"{before}/manifest.json")
    if manifest is None:
        return None
    began = time.monotonic()
    old = set(manifest["parts"])
    if lost := old - (run.store.part_names(before) & run.store.part_names("encoded")):
        say(f"{before} or its encoded rows have lost {min(lost)}, so it is not known what has changed since")
        return None
    left = old.difference(chosen.parts)
    gone = [part for part in manifest["parts"] if part in left]
    files = pipeline.files_of(run.store, gone)
    removed = {part: files[part] for part in gone}
    added = {part: pool[part]["file"] for part in chosen.parts if part not in old}
    pairs = changes.pair_up(removed, added, [part for part in chosen.parts if part in old])
    folders = (before, f"masked/{snapshot}")
    try:
        found = pipeline.count_changes(run.store, pairs, folders, chosen.losses, chosen.select)
    except Damaged as error:
        if not all(file.startswith(f"{before}/") for file in error.files):
            raise
        say(f"{error}; until then it is not known what has changed since")
        return None
    run.lock.check()
    result = {
        "since": latest["snapshot"],
        **dict(zip(changes.COUNTS, found["counts"][: len(changes.COUNTS)].tolist(), strict=True)),
        "drift": changes.distance(found["known"], found["new"]),
    }
    run.store.write_json(file, result)
    run.time("compare", time.monotonic() - began)
    _warn(run, result)
    return result


def _warn(run: Run, result: dict[str, Any]) -> None:
    limit = run.config.select.warn_drift
    if result["drift"] is None:
        return
    metrics.DRIFT.set(result["drift"])
    new, known = result["rows_new"], result["rows_unchanged"]
    # two-sample Kolmogorov-Smirnov, α = 0.01: equal distributions are further apart once in a hundred
    chance = 1.63 * math.sqrt((new + known) / (new * known))
    if result["drift"] > max(limit, chance):
        say(
            f"warning: scores of the {result['rows_new']:,} new rows lie {result['drift']:.2f} from those of the rows "
            f"that were there before (Kolmogorov-Smirnov distance, select.warn_drift {limit}): look at what has arrived"
            ", and whether the reference knows its kind"
        )
