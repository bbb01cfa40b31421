"""The four jobs. Input: a `Config`. Output: a run folder, see `layout`, and the contents of its run.json.

- `clean`: fixed-model cleaning; score the pool once under base and reference, keep the top share, publish.
- `sweep`: what each ratio would keep, from the losses of `clean`; nothing is published.
- `evolve`: rounds of select → train → check on held-out rows, see `loop`.
- `train`: fine-tune on a masked dataset.

The same call again finishes what is missing.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from tokenclean_ray import metrics, pipeline, scorers, settle, workers
from tokenclean_ray.config import Config, Select
from tokenclean_ray.errors import UserError, redact
from tokenclean_ray.layout import Store, run_folder
from tokenclean_ray.lock import hold
from tokenclean_ray.loop import Loop, Round, plan_rounds
from tokenclean_ray.masking import EVERYTHING, Selection, find_selection, mask, train_on
from tokenclean_ray.models import ModelSpec, describe, load_tokenizer, vocabulary_fingerprint
from tokenclean_ray.parts import Splits
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.run import Losses, Run, Summaries, count_rows, encode, open_run, with_repairs
from tokenclean_ray.snapshots import changes_since, claim_snapshot, finish_snapshot
from tokenclean_ray.storage import absolute, filesystem, use_endpoint
from tokenclean_ray.train import fine_tune, job_for
from tokenclean_ray.trainable import check_settings

LONGEST_NAME = 120  # of a snapshot's selection
FEW_HELD_OUT = 10
# the pool may hold the same file, and other files beside it give its columns other types
HELD_OUT, WARMUP = Splits(("heldout",)), Splits(("warmup",))


# -- clean -------------------------------------------------------------------------------------------------------


def clean(config: Config) -> dict[str, Any]:
    """Score the pool under base and reference, keep the top share, publish the masked dataset.

    Raises:
        UserError: what the user can mend, before anything is spent on it where that is possible.
    """
    with open_run(config, "clean") as run:
        return with_repairs(run, _clean)


def _clean(run: Run) -> dict[str, Any]:
    select, kept = settle.kept_cut(run.config.select)
    pool, losses, select, calibration = _scored_pool(run, select, kept)
    chosen = find_selection(run, pool, losses, select, calibration, kept)
    snapshot = claim_snapshot(run, chosen.name)
    published = mask(run, chosen, f"masked/{snapshot}")
    run.record["changes"] = changes_since(run, snapshot, chosen, pool)
    run.record["threshold"] = chosen.threshold
    return _finish(run, pool, published, chosen.name, snapshot, chosen.parts)


def sweep(config: Config) -> dict[str, Any]:
    """What each ratio from 0.1 to 0.9 would keep, from the losses of `clean`, which are made where they are missing.

    Returns:
        the record with `sweep`, see `settle.sweep`, and `calibration` where noise was planted.
    """
    with open_run(config, "sweep") as run:
        return with_repairs(run, _sweep)


def _sweep(run: Run) -> dict[str, Any]:
    # keep_ratio: auto ends a run where no ratio will do; the sweep shows just that
    every = {"keep_ratio": 1.0, "calibrate": settle.calibration_of(run.config.select)}
    pool, losses, select, calibration = _scored_pool(run, run.config.select.model_copy(update=every))
    run.record["sweep"] = settle.sweep(run, select, pool, losses)
    run.record["calibration"] = calibration
    run.save()
    return run.record


def _scored_pool(
    run: Run, select: Select, kept: dict[str, Any] | None = None
) -> tuple[Summaries, Losses, Select, dict[str, Any] | None]:
    """The encoded pool, its losses, the selection without auto, and the calibration.

    Args:
        kept: a cut that must be of the same models.
    """
    pool = encode(run, run.config.data.path or (), Splits())
    models = {"base": run.base}
    held_out: Summaries = {}
    if "reference" in scorers.models(select):
        models["reference"], held_out = _reference(run)
        run.record["models"]["reference"] = asdict(models["reference"])
    if kept:
        settle.check_same_models(run, select, models, kept)
    return pool, *settle.score_and_settle(run, select, models, pool, held_out)


def _reference(run: Run) -> tuple[ModelSpec, Summaries]:
    """The configured reference, or the base trained on the warm-up set; and clean rows where the gate wants them."""
    hold_out = run.config.select.gate == "auto"
    if run.reference and not hold_out:
        return run.reference, {}
    warmup, held_out = _warmup_rows(run, hold_out)
    return run.reference or _train_on_all(run, warmup), held_out


def _train_on_all(run: Run, warmup: Summaries) -> ModelSpec:
    """The reference: the base trained on every response token of the warm-up rows."""
    return train_on(run, "reference", run.base, find_selection(run, warmup, {}, EVERYTHING))[0]


def _warmup_rows(run: Run, hold_out: bool) -> tuple[Summaries, Summaries]:
    """The warm-up rows and clean held-out rows: those of data.held_out, or a share of the warm-up set."""
    data, share, seed = run.config.data, run.config.evolve.held_out_share, run.config.seed
    held_out = encode(run, data.held_out, HELD_OUT) if hold_out and data.held_out else {}
    if not data.warmup:
        return {}, held_out
    if held_out or not hold_out:
        return encode(run, data.warmup, WARMUP), held_out
    kinds = (f"held{share:g}.{seed}", f"warm{share:g}.{seed}")
    rows = encode(run, data.warmup, Splits(kinds, (share, 1 - share), seed))
    held, warm = ({p: s for p, s in rows.items() if s["split"] == kind} for kind in kinds)
    return warm, held if sum(s["response_tokens"] for s in held.values()) else {}


def _finish(
    run: Run,
    pool: Summaries,
    published: list[dict[str, Any]],
    name: str,
    snapshot: str,
    parts: list[str],
    left: int = 0,
) -> dict[str, Any]:
    """Count, name the snapshot as the newest, commit the record; `left`: rows that nothing was selected from."""
    rows, reasons = count_rows(pool)
    counts = {
        "rows": rows,
        "rejected": reasons.total(),
        "warmup": left,
        "nothing_kept": sum(s["nothing_kept"] for s in published),
        "masked": sum(s["rows"] for s in published),
        "tokens": sum(s["tokens"] for s in pool.values()),
        "response_tokens": sum(s["response_tokens"] for s in pool.values()),
        "rejected_reasons": dict(reasons.most_common()),
    }
    if rows != sum(counts[key] for key in ("rejected", "warmup", "nothing_kept", "masked")):
        raise AssertionError(f"rows were lost or doubled: {counts}")
    finish_snapshot(run, snapshot, name, parts)
    for reason, count in reasons.items():
        metrics.REJECTED.set(count, {"reason": reason})
    run.record["counts"] = counts
    run.record["result"] = {
        "selection": name,
        "snapshot": snapshot,
        "path": redact(f"{run.store.url}/masked/{snapshot}"),
    }
    run.save()
    return run.record


# -- train -------------------------------------------------------------------------------------------------------


def train(config: Config) -> dict[str, Any]:
    """Fine-tune `train.model` on `train.data`; the model goes to RUN/models."""
    use_endpoint(config.endpoint_url)
    name = str(config.train.model or config.model.base)
    start = describe(name, trusted=config.model.trusts(name))
    store = Store(run_folder(config.output))
    tokenizer = load_tokenizer(start.path, start.trusted, start.revision)  # without one nothing trained could be saved
    check_settings(start, config.train)
    files, identity, template = _training_files(absolute(str(config.train.data)), start, tokenizer)
    if template:  # what wrote the rows; of other folders the config alone says it
        config = config.model_copy(update={"data": config.data.model_copy(update={"template": template})})
    with hold(store, "train"):
        metrics.follow(store.url)
        workers.connect(config.endpoint_url)
        job = job_for(store, "trained", files, identity, start, config, start)
        manifest = fine_tune(job)
    return {"path": redact(f"{store.url}/models/{job.name}"), **manifest}


def _training_files(url: str, start: ModelSpec, tokenizer: Any) -> tuple[list[str], str, str | None]:
    """The files of a masked dataset, what tells it from others, and its data.template, where it is known."""
    fs, where = filesystem(url, f"train.data {url}")
    if fs.isfile(where):
        raise UserError(f"train.data {url} is a file: name its folder, {url.rpartition('/')[0]}")
    data = Store(url)
    if latest := data.read_json("masked/latest.json"):
        snapshot = f"masked/{latest['snapshot']}"
        manifest = data.read_json(f"{snapshot}/manifest.json")
        if manifest is None:
            raise UserError(f"train.data {url}: {snapshot}, the newest, has no manifest.json: clean the data again")
        if manifest["tokenizer"] != vocabulary_fingerprint(tokenizer):
            raise UserError(
                f"train.data {url} was made with another tokenizer than that of {start.path}: "
                "set train.model to the run's base or a model that shares its tokenizer"
            )
        if missing := set(manifest["parts"]) - data.part_names(snapshot):
            raise UserError(f"train.data {url}: {snapshot} has lost {min(missing)}: clean the data again")
        files = [f"{url}/{snapshot}/{part}.parquet" for part in manifest["parts"]]
        return files, manifest["selection"], manifest.get("template")  # older ones do not say
    if parts := sorted(data.part_names("")):
        content = data.checksums("", [f"{part}.parquet" for part in parts])
        return [f"{url}/{part}.parquet" for part in parts], json.dumps([url, content]), None
    if data.read_json("state.json"):
        return [url], json.dumps([url, *data.checksums("", ["state.json"])]), None
    raise UserError(
        f"train.data {url}: neither a finished run folder nor a folder of Parquet files or a saved datasets folder"
    )


# -- evolve ------------------------------------------------------------------------------------------------------


def evolve(config: Config) -> dict[str, Any]:
    """Run the plans, compare them, publish the last one's masked dataset and model."""
    rounds = plan_rounds(config)
    with open_run(config, "evolve") as run:
        return with_repairs(run, lambda run: _evolve(run, rounds))


def _evolve(run: Run, rounds: list[Round]) -> dict[str, Any]:
    config = run.config
    evolve, seed = config.evolve, config.seed
    names = tuple(f"{i}of{evolve.num_subsets}.{seed}" for i in range(evolve.num_subsets))
    pool = encode(run, config.data.path or (), Splits(names, (1 / evolve.num_subsets,) * evolve.num_subsets, seed))
    warmup, held_out = _clean_rows(run, pool, names)
    reference = run.reference or _train_on_all(run, warmup)
    run.record["models"]["reference"] = asdict(reference)

    def of(subsets: tuple[int, ...]) -> Summaries:
        return {part: s for part, s in pool.items() if s["split"] in [names[i] for i in subsets]}

    outcomes: list[dict[str, Any]] = []
    loop = Loop(run, held_out, reference)
    for round in rounds:
        if outcome := loop.turn(round, of(round.subsets)):
            outcomes.append(outcome)
            run.store.write_bytes("metrics.jsonl", redact("".join(json.dumps(o) + "\n" for o in outcomes)).encode())
    run.store.write_json("comparison.json", loop.comparison)
    run.record["comparison"] = loop.comparison
    run.record["rounds"] = [{key: value for key, value in o.items() if key != "training_curve"} for o in outcomes]
    last = [o for o in outcomes if o["plan"] == rounds[-1].plan]
    published, name, snapshot, parts = _publish_rounds(run, last, loop.selections)
    run.record["result_model"] = redact(loop.newest.path)
    left = sum(pool[part]["rows"] for part in pool.keys() - set(parts))
    return _finish(run, pool, published, name, snapshot, parts, left)


def _clean_rows(run: Run, pool: Summaries, names: tuple[str, ...]) -> tuple[Summaries, Summaries]:
    """The warm-up rows and the held-out rows; either may be empty."""
    warmup, held_out = _warmup_rows(run, hold_out=True)
    rows = sum(s["rows"] for s in held_out.values())
    if held_out and run.config.evolve.guard and rows < FEW_HELD_OUT:
        say(f"warning: {rows} held-out rows say little of a round: give more data.held_out, or set evolve.guard: false")
    if not held_out and run.config.evolve.guard:
        say("the guard is off: no clean rows to judge a round by; give data.held_out, or more rows as data.warmup")
    if run.config.data.warmup:
        return warmup, held_out
    if not run.config.model.reference:
        say(
            "warning: no data.warmup, so subset 0 of the pool is the warm-up. If the pool is noisy, the reference "
            "learns the noise and then ranks noise above signal: give a small clean set as data.warmup"
        )
    return {part: s for part, s in pool.items() if s["split"] == names[0]}, held_out


def _publish_rounds(
    run: Run, outcomes: list[dict[str, Any]], selections: dict[str, Selection]
) -> tuple[list[dict[str, Any]], str, str, list[str]]:
    """One masked dataset from every round's selection, with a `round` column: summaries, names, parts."""
    origin = {
        part: (outcome["round"], selections[outcome["selection"]].folder)
        for outcome in outcomes
        for part in selections[outcome["selection"]].parts
    }
    name = "-".join(["rounds", *dict.fromkeys(o["selection"][-8:] for o in outcomes)])
    if len(name) > LONGEST_NAME:
        name = f"rounds-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    snapshot = claim_snapshot(run, name)
    with Stage("publish", len(origin)) as stage:
        published = []
        for summary in pipeline.copy_rounds(run.store, f"masked/{snapshot}", origin):
            published.append(summary)
            stage.advance(rows=summary["rows"])
    return published, name, snapshot, list(origin)
