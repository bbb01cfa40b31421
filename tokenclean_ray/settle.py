"""What a `select` section leaves open, made numbers: gate: auto, keep_ratio: auto; the planted calibration; the sweep.

Input: a run whose losses are there. Output: a `Select` without auto, and small records for threshold.json and people.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from tokenclean_ray import calibrate, pipeline
from tokenclean_ray.config import Calibrate, Select, UserError
from tokenclean_ray.plant import KINDS
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.run import Losses, Run, Summaries

RATIOS = [round(0.1 * n, 1) for n in range(1, 10)]
GATES = {
    "loss": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
    "surprise": (0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
    "rank": (1, 4, 16, 64, 256),
}
LEAST_PLANTED = 200  # tokens, for keep_ratio: auto


def calibration_of(select: Select) -> Calibrate | None:
    """What is to be planted: keep_ratio: auto wants it in any case."""
    return select.calibrate or (Calibrate() if select.keep_ratio == "auto" else None)


def plant_copies(run: Run, pool: Summaries) -> Summaries:
    """Copies of some rows of the pool with planted noise, where the config asks for them."""
    settings = calibration_of(run.config.select)
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


def settle(
    run: Run, select: Select, pool: Summaries, copies: Summaries, held_out: Summaries, losses: Losses
) -> tuple[Select, dict[str, Any] | None]:
    """A selection without auto, and the calibration's record where noise was planted.

    Args:
        copies: of `plant_copies`, scored.
        held_out: clean rows, scored; what gate: auto is read from.

    Raises:
        UserError: no clean rows, too little planted noise, or no ratio that keeps noise under select.max_noise.
    """
    if select.gate == "auto":
        select = select.model_copy(update={"gate": _clean_quantile(run, select, held_out, losses)})
        say(f"   gate {select.gate:.4g}: {select.gate_quantile:.0%} of the clean held-out tokens are within")
    if not copies:
        return select, None
    record, scores = _calibration(run, select, pool, copies, losses)
    if select.keep_ratio == "auto":
        if record["planted"] < LEAST_PLANTED:
            raise UserError(
                f"keep_ratio: auto wants at least {LEAST_PLANTED} planted tokens, not {record['planted']}: "
                "raise select.calibrate.share"
            )
        ratio = calibrate.largest_ratio(scores, record["noise_share"]["value"], select.max_noise)
        if ratio is None:
            raise UserError(
                f"no keep_ratio keeps the estimated share of noise within select.max_noise {select.max_noise}: "
                "raise it, or take another scorer or reference"
            )
        say(f"   keep_ratio {ratio}: the largest whose kept tokens hold at most {select.max_noise:.1%} noise")
        select = select.model_copy(update={"keep_ratio": ratio})
    return select, record


def _clean_quantile(run: Run, select: Select, held_out: Summaries, losses: Losses) -> float:
    """What a share of the clean tokens is as plausible as, or more: exact, by the cut of their plausibility."""
    parts = [part for part, summary in held_out.items() if summary["response_tokens"]]
    if not parts:
        raise UserError("select.gate: auto is read from clean rows: set data.held_out or data.warmup, or a gate")
    by = Select(scorer="plausibility", gate_on=select.gate_on, keep_ratio=select.gate_quantile)
    found = pipeline.find_cuts(run.store, parts, losses, by, [select.gate_quantile])["", select.gate_quantile]
    return -found.cut.score


def _calibration(
    run: Run, select: Select, pool: Summaries, copies: Summaries, losses: Losses
) -> tuple[dict[str, Any], calibrate.Scores]:
    suffix = calibrate.copies_suffix(calibration_of(select) or Calibrate())
    pairs = [(part, part + suffix if part + suffix in copies else None) for part in _with_tokens(pool)]
    pairs = [(part, copy if copy and copies[copy]["rows"] else None) for part, copy in pairs]
    by = {"": select}
    if "reference" in losses:
        by["gates"] = Select(scorer="plausibility", gate_on=select.gate_on)
    counts = {name: pipeline.count_scores(run.store, pairs, losses, scored) for name, scored in by.items()}
    scores = calibrate.Scores.of(counts[""])
    shares = [
        calibrate.estimate(one, lambda p, g, one=one: calibrate.noise_share(p, one.pool))
        for one in map(calibrate.Scores.of, counts.values())
    ]
    share = min(shares, key=lambda found: found.value)  # each is an upper bound
    record: dict[str, Any] = {
        "settings": (calibration_of(select) or Calibrate()).model_dump(),
        "rows": sum(copies[copy]["rows"] for _, copy in pairs if copy),
        "planted": int(scores.planted.sum()),
        "genuine": int(scores.genuine.sum()),
        "auroc": asdict(calibrate.estimate(scores, calibrate.auroc)),
        "noise_share": asdict(share),
        "ratios": calibrate.dropped_by_ratio(scores, RATIOS, share.value),
    }
    for kind in KINDS:
        record[f"auroc_{kind}"] = asdict(calibrate.estimate(calibrate.Scores.of(counts[""], (kind,)), calibrate.auroc))
    if "gates" in counts:
        plausibility = calibrate.Scores.of(counts["gates"])
        record["gate_on"] = select.gate_on
        record["gates"] = calibrate.dropped_by_gate(plausibility, GATES[select.gate_on])
    return record, scores


def _with_tokens(parts: Summaries) -> list[str]:
    return [part for part, summary in parts.items() if summary["response_tokens"]]


def sweep(run: Run, select: Select, pool: Summaries, losses: Losses) -> list[dict[str, Any]]:
    """What each ratio from 0.1 to 0.9 would keep, from the losses that are there; all ratios in the same passes.

    Returns:
        per ratio `ratio`, `score` (the threshold), `kept`, `near` (tokens near the cut), `bound` (the term of
        Theorem 5.1) and `sources` (source → [response tokens, kept tokens]); committed to selections/sweep-….json.
    """
    parts = _with_tokens(pool)
    identity = json.dumps([parts, losses, select.model_dump(mode="json"), RATIOS], sort_keys=True)
    file = f"selections/sweep-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.json"
    if (rows := run.store.read_json(file)) is not None:
        return rows
    with Stage("sweep", len(parts)) as stage:
        found = pipeline.find_cuts(run.store, parts, losses, select, RATIOS)
        cuts = {ratio: one.cut for (_, ratio), one in found.items()}
        rows = [
            {
                "ratio": ratio,
                "score": one.cut.score if one.k else None,
                "kept": one.k,
                "near": 0,
                "bound": calibrate.bound_term(one.k),
                "sources": {},
            }
            for (_, ratio), one in sorted(found.items())
        ]
        for result in pipeline.sweep_parts(run.store, parts, losses, select, cuts):
            for row, part in zip(rows, result["ratios"], strict=True):
                row["near"] += part["near"]
                for source, counts in part["sources"].items():
                    total = row["sources"].setdefault(source, [0, 0])
                    total[0], total[1] = total[0] + counts[0], total[1] + counts[1]
            stage.advance()
    run.store.write_json(file, rows)
    return rows
