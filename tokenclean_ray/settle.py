"""What a `select` section leaves open, made numbers: gate: auto, keep_ratio: auto; the planted calibration; the sweep.

Input: a run and its encoded pool, which is scored first, or the cut of another run. Output: a `Select` without auto,
and small records for threshold.json and people.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from tokenclean_ray import calibrate, pipeline, scorers
from tokenclean_ray.config import Calibrate, Select
from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError, redact
from tokenclean_ray.layout import Store
from tokenclean_ray.masking import NOT_DECIDING
from tokenclean_ray.models import ModelSpec
from tokenclean_ray.plant import KINDS
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.run import Losses, Run, Summaries, losses_of, score, with_tokens
from tokenclean_ray.storage import absolute
from tokenclean_ray.tokens import Sources, add_sources

RATIOS = [round(0.1 * n, 1) for n in range(1, 10)]
GATES = {
    "loss": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
    "surprise": (0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
    "rank": (1, 4, 16, 64, 256),
}
# fields that have had their effect by then, as if left out: the same numbers are the same selection, however found
HOW_SETTLED = {
    name: Select.model_fields[name].default for name in ("gate_quantile", "max_noise", "calibrate", "cut", "warn_drift")
}
LEAST_PLANTED = 200  # tokens, for keep_ratio: auto


def calibration_of(select: Select) -> Calibrate | None:
    """What is to be planted: keep_ratio: auto wants it in any case."""
    return select.calibrate or (Calibrate() if select.keep_ratio == "auto" else None)


def score_and_settle(
    run: Run, select: Select, models: dict[str, ModelSpec], pool: Summaries, held_out: Summaries
) -> tuple[Losses, Select, dict[str, Any] | None]:
    """The losses that the scorer reads of base and reference, the selection without auto, and the calibration."""
    losses = losses_of(run, select, models)
    copies = _plant_copies(run, select, pool)
    if losses:
        score(run, {folder: models[role] for role, folder in losses.items()}, pool | copies | held_out)
    return losses, *_settle(run, select, pool, copies, held_out, losses)


def kept_cut(select: Select) -> tuple[Select, dict[str, Any] | None]:
    """The selection that select.cut names, and its cut; as it is, and None, where no cut is kept.

    Returns:
        what `find_selection` takes: `cut` and `score`, or `cuts`; `cut_of`, where it is from; and `losses`.

    Raises:
        UserError: there is no cut, or keys of the section contradict what it was found by.
    """
    if select.cut is None:
        return select, None
    found = Store(absolute(select.cut).removesuffix("/threshold.json")).read_json("threshold.json")
    if found is None:
        raise UserError(f"select.cut {select.cut} has no threshold.json: name a folder selections/<name> of a run")
    kept = {name: found[name] for name in ("cut", "score") if name in found}
    if "cuts" in found:
        kept["cuts"] = {source: {name: of[name] for name in ("cut", "score")} for source, of in found["cuts"].items()}
    if not kept:
        raise UserError(
            f"select.cut {select.cut}: with scope: sample each row has its own cut, so there is none to keep"
        )
    by = Select.model_construct(**found["select"])
    for name in sorted(select.model_fields_set - HOW_SETTLED.keys()):
        given, was = getattr(select, name), getattr(by, name)
        if given not in (was, "auto"):
            raise UserError(f"select.{name} is {given}, but select.cut was found with {was}: leave {name} or cut out")
    keep = {name: getattr(select, name) for name in ("calibrate", "warn_drift")}
    return by.model_copy(update=keep), {**kept, "cut_of": redact(select.cut), "losses": found["losses"]}


def check_same_models(run: Run, select: Select, models: dict[str, ModelSpec], kept: dict[str, Any]) -> None:
    """Raise `UserError` where a kept cut is on the losses of other models."""
    for role, folder in losses_of(run, select, models).items():
        if kept["losses"][role] != folder:
            raise UserError(
                f"select.cut {kept['cut_of']} was found on {kept['losses'][role]}, but the {role} of this run gives "
                f"{folder}: scores of other models know no common cut; name the same models, or leave select.cut out"
            )


def _plant_copies(run: Run, select: Select, pool: Summaries) -> Summaries:
    """Copies of some rows of the pool with planted noise, where the selection asks for them."""
    settings = calibration_of(select)
    if settings is None:
        return {}
    parts = [part for part, summary in pool.items() if summary["rows"]]
    vocabulary = run.encoder.tokenizer.get_vocab().values()
    candidates = np.array(sorted(set(vocabulary) - set(run.encoder.tokenizer.all_special_ids)), np.int32)
    with Stage("plant", len(parts)) as stage:
        copies = {}
        for summary in pipeline.plant_parts(run.store, parts, settings, candidates):
            copies[summary["part"]] = summary
            stage.advance(rows=summary["rows"])
    return copies


def _settle(
    run: Run, select: Select, pool: Summaries, copies: Summaries, held_out: Summaries, losses: Losses
) -> tuple[Select, dict[str, Any] | None]:
    """A selection that holds what decides which tokens are kept, nothing open, and the calibration's record.

    Args:
        copies: of `_plant_copies`, scored.
        held_out: clean rows, scored; what gate: auto is read from.

    Raises:
        UserError: no clean rows, too little planted noise, or no ratio that keeps noise under select.max_noise.
    """
    if select.gate == "auto":
        select = select.model_copy(update={"gate": _clean_quantile(run, select, held_out, losses)})
        say(f"   gate {select.gate:.4g}: {select.gate_quantile:.0%} of the clean held-out tokens are within")
    record = _calibration(run, select, pool, copies, losses) if copies else None
    if select.keep_ratio == "auto" and record:
        if record["planted"] < LEAST_PLANTED:
            raise UserError(
                f"keep_ratio: auto wants at least {LEAST_PLANTED} planted tokens, not {record['planted']}: "
                "raise select.calibrate.share"
            )
        if record["largest_ratio"] is None:
            raise UserError(
                f"no keep_ratio keeps the estimated share of noise within select.max_noise {select.max_noise}: "
                "raise it, or take another scorer or reference"
            )
        ratio = record["largest_ratio"]
        say(f"   keep_ratio {ratio}: the largest that keeps at most {select.max_noise:.1%} noise like the planted")
        select = select.model_copy(update={"keep_ratio": ratio})
    return select.model_copy(update=HOW_SETTLED), record


def _clean_quantile(run: Run, select: Select, held_out: Summaries, losses: Losses) -> float:
    """What a share of the clean tokens is as plausible as, or more: exact, by the cut of their plausibility."""
    parts = with_tokens(held_out)
    if not parts:
        raise UserError(
            "select.gate: auto is read from clean rows, and none are held out: give more rows as data.warmup, or set "
            "data.held_out or a gate"
        )
    by = Select(scorer="plausibility", gate_on=select.gate_on, keep_ratio=select.gate_quantile)
    found = pipeline.find_cuts(run.store, parts, losses, by, [select.gate_quantile])["", select.gate_quantile]
    if found.k == 0:
        raise UserError(
            f"select.gate: auto: {found.tokens} clean tokens are too few for the quantile {select.gate_quantile}: give "
            "more clean rows, or a gate"
        )
    return scorers.gate_up_to(-found.cut.score)


def _calibration(run: Run, select: Select, pool: Summaries, copies: Summaries, losses: Losses) -> dict[str, Any]:
    settings = calibration_of(select)
    assert settings is not None
    suffix = calibrate.copies_suffix(settings)
    copied = {part.removesuffix(suffix) for part, summary in copies.items() if summary["rows"]}
    pairs = [(part, part + suffix if part in copied else None) for part in with_tokens(pool)]

    def count() -> dict[str, Any]:
        by = {"": select}
        if "reference" in losses:
            by["gates"] = Select(scorer="plausibility", gate_on=select.gate_on)
        counts = pipeline.count_scores(run.store, pairs, losses, by)
        scores = {name: calibrate.Scores.of(found) for name, found in counts.items()}
        share = calibrate.pool_noise(scores.values())
        record: dict[str, Any] = {
            "settings": settings.model_dump(),
            "rows": sum(summary["rows"] for summary in copies.values()),
            "planted": int(scores[""].planted.sum()),
            "genuine": int(scores[""].genuine.sum()),
            "auroc": asdict(calibrate.estimate(scores[""], calibrate.auroc)),
            "noise_share": share,
            "largest_ratio": calibrate.largest_ratio(scores[""], share, select.max_noise),
            "ratios": calibrate.dropped_by_ratio(scores[""], RATIOS, share),
        }
        for kind in KINDS:
            of_kind = calibrate.Scores.of(counts[""], (kind,))
            record[f"auroc_{kind}"] = asdict(calibrate.estimate(of_kind, calibrate.auroc))
        if "gates" in scores:
            record["gate_on"] = select.gate_on
            record["gates"] = calibrate.dropped_by_gate(scores["gates"], GATES[select.gate_on])
        return record

    scored = select.model_dump(mode="json", exclude=NOT_DECIDING | {"keep_ratio", "calibrate", "scope"})
    method = [calibrate.METHOD, calibrate.RISK]
    return _once(run, "calibration", [pairs, losses, settings.model_dump(), RATIOS, GATES, method, scored], count)


def _once(run: Run, name: str, identity: Any, make: Callable[[], Any]) -> Any:
    """What a file of selections/ holds; made and committed where it is not there.

    Args:
        identity: all that decides the contents.
    """
    file = f"selections/{name}-{digest(identity)}.json"
    found = run.store.read_json(file)
    if found is None:
        run.store.write_json(file, found := make())
    return found


def sweep(run: Run, select: Select, pool: Summaries, losses: Losses) -> list[dict[str, Any]]:
    """What each ratio from 0.1 to 0.9 would keep of all tokens, from the losses that are there, in the same passes.

    The scope is global, whatever the selection's.

    Returns:
        per ratio `ratio`, `score` (the threshold), `kept`, `near` (tokens near the cut), `bound` (the term of
        Theorem 5.1) and `sources` (source → [response tokens, kept tokens]); committed to selections/sweep-….json.
    """
    parts = with_tokens(pool)
    select = select.model_copy(update={"scope": "global", "keep_ratio": 1.0})

    def count() -> list[dict[str, Any]]:
        near = dict.fromkeys(RATIOS, 0)
        sources: dict[float, Sources] = {ratio: {} for ratio in RATIOS}
        with Stage("sweep", len(parts)) as stage:
            found = pipeline.find_cuts(run.store, parts, losses, select, RATIOS)
            cuts = {ratio: one.cut for (_, ratio), one in found.items()}
            for result in pipeline.sweep_parts(run.store, parts, losses, select, cuts):
                for ratio, of_part in zip(RATIOS, result["ratios"], strict=True):
                    near[ratio] += of_part["near"]
                    sources[ratio] = add_sources(sources[ratio], of_part["sources"])
                stage.advance()
        return [
            {
                "ratio": ratio,
                "score": one.cut.score if one.k else None,
                "kept": one.k,
                "near": near[ratio],
                "bound": calibrate.bound_term(one.k),
                "sources": dict(sorted(sources[ratio].items())),
            }
            for (_, ratio), one in sorted(found.items())
        ]

    return _once(run, "sweep", [parts, losses, select.model_dump(mode="json", exclude=NOT_DECIDING), RATIOS], count)
