"""A run's selections: the cut over some parts, found once, then read; the rows that it masks; a model trained on them.

Input: encoded parts and the folders of their losses. Output: selections/<name>/threshold.json, masked rows, models.
"""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from tokenclean_ray import metrics, pipeline, selection
from tokenclean_ray.config import Select
from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import PART_SUFFIX, Damaged
from tokenclean_ray.models import ModelSpec, describe
from tokenclean_ray.progress import Stage
from tokenclean_ray.run import Losses, Run, Summaries, with_tokens
from tokenclean_ray.tokens import Cuts, Sources, add_sources, cuts_of
from tokenclean_ray.train import fine_tune, job_for

NOT_DECIDING = {"cut", "warn_drift"}  # fields of a selection
EVERYTHING = Select(scorer="random", keep_ratio=1.0)


@dataclass(frozen=True)
class Selection:
    """A found cut and where its threshold.json lies; `threshold` is that file's contents."""

    name: str
    parts: list[str]
    losses: Losses
    select: Select
    carried: dict[str, str]
    """The columns that its masked rows have besides, and their Arrow types."""
    threshold: dict[str, Any]

    @property
    def cuts(self) -> Cuts | None:
        """By source, or one for all; None where each row has its own."""
        return cuts_of(self.threshold)

    @property
    def folder(self) -> str:
        """Of threshold.json, and of the masked rows of a round."""
        return f"selections/{self.name}"


def find_selection(
    run: Run,
    parts: Summaries,
    losses: Losses,
    select: Select,
    calibration: dict[str, Any] | None = None,
    kept: dict[str, Any] | None = None,
) -> Selection:
    """The cut over some parts; found once, then read. A calibration goes with it.

    Args:
        kept: the cut, where it is not to be found but was, see `settle.kept_cut`.
    """
    names = with_tokens(parts)
    deciding = [{name: kept[name] for name in ("cut", "cuts") if name in kept}] if kept else []
    carried: dict[str, str] = next((summary["carried"] for summary in parts.values()), {})  # the same for all
    identity = [names, losses, select.model_dump(mode="json", exclude=NOT_DECIDING), carried, *deciding]
    name = f"{select.scorer}-{select.scope}-{select.ratio:g}-{digest(identity)}"
    file = f"selections/{name}/threshold.json"
    found = run.store.read_json(file)
    threshold = dict(found or _cut(run, parts, names, losses, select, kept))
    threshold.pop("calibration", None)  # of an earlier run
    if calibration:
        threshold["calibration"] = calibration
    if threshold != found:
        run.store.write_json(file, threshold)
    return Selection(name, names, losses, select, carried, threshold)


def _cut(
    run: Run, parts: Summaries, names: list[str], losses: Losses, select: Select, kept: dict[str, Any] | None
) -> dict[str, Any]:
    """What a new threshold.json begins with."""
    began = time.monotonic()
    tokens = sum(parts[part]["response_tokens"] for part in names)
    threshold = {"tokens": tokens, "losses": losses, "select": select.model_dump(mode="json")}
    if kept:
        threshold |= kept
    elif select.scope != "sample":
        threshold |= _find_cuts(run, names, losses, select)
    run.time("select", time.monotonic() - began)
    return threshold


def _find_cuts(run: Run, parts: list[str], losses: Losses, select: Select) -> dict[str, Any]:
    found = pipeline.find_cuts(run.store, parts, losses, select, [select.ratio])
    k, tokens = (sum(getattr(one, name) for one in found.values()) for name in ("k", "tokens"))
    if tokens == 0:
        raise UserError(
            "these rows have no response token to select from: give more rows, or lower evolve.num_subsets or "
            "evolve.held_out_share"
        )
    if k == 0 and not any(selection.keep_count(select.ratio, one.tokens) for one in found.values()):
        of = f"{tokens} response tokens" + (" in any source" if select.scope == "source" else "")
        raise UserError(f"select.keep_ratio {select.keep_ratio} keeps none of {of}: raise it")
    if k == 0:
        raise UserError(f"the scorer {select.scorer} rules out all {tokens} response tokens: widen its limits")
    cuts = {source: asdict(one) | {"score": one.cut.score if one.k else None} for (source, _), one in found.items()}
    if select.scope == "source":
        return {"k": k, "cuts": cuts}
    return {"k": k, "cut": cuts[""]["cut"], "score": cuts[""]["score"]}


def mask(run: Run, chosen: Selection, folder: str) -> list[dict[str, Any]]:
    """Write the masked rows of a selection to a folder; its threshold.json then counts them. Returns the summaries."""
    published: list[dict[str, Any]] = []
    sources: Sources = {}
    with Stage("mask", len(chosen.parts)) as stage:
        how = chosen.losses, chosen.select, chosen.cuts, chosen.carried
        for summary in pipeline.publish_parts(run.store, folder, chosen.parts, *how):
            sources = add_sources(sources, summary.pop("sources"))
            published.append(summary)
            stage.advance(rows=summary["rows"])
        run.time("mask", stage.seconds)
    kept = sum(kept for _, kept in sources.values())
    if chosen.cuts and kept != chosen.threshold.setdefault("k", kept):
        # losses that were made again since, by other hardware: what is not published yet follows them
        why = f"{kept} tokens kept instead of {chosen.threshold['k']}"
        files = [f"{folder}/{part}{PART_SUFFIX}" for part in chosen.parts]
        if "cut_of" in chosen.threshold:  # the cut itself may be found nowhere else
            del chosen.threshold["k"]
            run.store.write_json(f"{chosen.folder}/threshold.json", chosen.threshold)
        else:
            files.insert(0, f"{chosen.folder}/threshold.json")
        raise Damaged({file: f"{run.store.url}/{file} is of other losses ({why})" for file in files})
    if not kept:
        by = chosen.threshold.get("cut_of") or f"select.keep_ratio {chosen.select.ratio}, scope {chosen.select.scope},"
        raise UserError(f"{by} keeps none of {chosen.threshold['tokens']} tokens: raise the ratio, or take another cut")
    metrics.KEPT_SHARE.set(kept / chosen.threshold["tokens"])
    counts = {"kept": kept, "near": sum(s["near"] for s in published), "ties": sum(s["ties"] for s in published)}
    chosen.threshold.update(counts, sources={s: {"tokens": n, "kept": k} for s, (n, k) in sorted(sources.items())})
    run.store.write_json(f"{chosen.folder}/threshold.json", chosen.threshold)
    return published


def train_on(run: Run, name: str, start: ModelSpec, chosen: Selection) -> tuple[ModelSpec, dict[str, Any]]:
    """Fine-tune on the masked rows of a selection; returns the model and its manifest."""
    mask(run, chosen, chosen.folder)
    files = [f"{run.store.url}/{chosen.folder}/{part}.parquet" for part in chosen.parts]
    job = job_for(run.store, name, files, json.dumps([chosen.name]), start, run.config, run.base)
    began = time.monotonic()
    manifest = fine_tune(job)
    run.time("train", time.monotonic() - began)
    return describe(f"{run.store.url}/models/{job.name}", trusted=start.trusted), manifest
