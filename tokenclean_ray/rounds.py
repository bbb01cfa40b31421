"""The main path: plan → encode → score → select → publish, each a state that storage shows as done or missing.

Input: a `Config`. Output: a run folder with a masked dataset, see `layout`. The same call again finishes what is
missing; the driver holds nothing but small summaries, so it may die at any point.
"""

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from tokenclean_ray import __version__, pipeline, selection, source
from tokenclean_ray.config import Config, UserError
from tokenclean_ray.encode import Encoder, build_encoder, encoding_fingerprint
from tokenclean_ray.layout import Store, absolute
from tokenclean_ray.models import ModelSpec, check_compatible, describe, load_tokenizer
from tokenclean_ray.parts import extra_types
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.source import Part

COLOCATE_BYTES = 24 << 30  # both models' weights and room for activations fit a 40 GB GPU


@dataclass(frozen=True)
class Prepared:
    """What is known before any work: checked inputs."""

    store: Store
    files: list[tuple[str, str]]
    base: ModelSpec
    reference: ModelSpec
    encoder: Encoder


def clean(config: Config) -> dict[str, Any]:
    """Fixed-model cleaning: score the pool under base and reference once, keep the top share, publish.

    Returns:
        the contents of run.json.

    Raises:
        UserError: what the user can mend, before anything is spent on it where that is possible.
    """
    prepared = prepare(config)
    pipeline.connect()
    store, timings = prepared.store, {}
    record: dict[str, Any] = {
        "tokenclean": __version__,
        "config": config.model_dump(mode="json"),
        "versions": pipeline.versions(),
        "models": {"base": asdict(prepared.base), "reference": asdict(prepared.reference)},
    }
    store.write_json("run.json", record)

    began = time.monotonic()
    parts, extra = _plan(prepared, config)
    timings["plan_s"] = time.monotonic() - began
    encoded = _encode(prepared, config, parts, extra, timings)
    losses = _score(prepared, config, encoded, timings)
    name, snapshot, published = _select(store, config, encoded, losses, timings)

    record["counts"] = _counts(encoded, published)
    record["result"] = {"selection": name, "snapshot": snapshot, "path": f"{store.url}/masked/{snapshot}"}
    record["timings"] = {key: round(value, 3) for key, value in timings.items()}
    record["threshold"] = store.read_json(f"selections/{name}/threshold.json")
    store.write_json("run.json", record)
    return record


def prepare(config: Config) -> Prepared:
    """Check everything that can be checked without a cluster."""
    files = source.list_files(config.data.path)
    base = describe(config.model.base)
    reference = describe(config.model.reference, base)
    tokenizer = load_tokenizer(base.path)
    check_compatible(base, reference, tokenizer, config.data.max_length)
    encoder = build_encoder(tokenizer, config.data.template, config.data.max_length, config.data.on_overflow)
    return Prepared(Store(absolute(config.output)), files, base, reference, encoder)


def _plan(prepared: Prepared, config: Config) -> tuple[list[Part], dict[str, pa.DataType]]:
    data = config.data
    shaping = data.model_dump(include={"max_length", "on_overflow", "format", "columns", "extra_columns"})
    encoding = hashlib.sha256(encoding_fingerprint(prepared.encoder, shaping).encode()).hexdigest()
    wanted = list(dict.fromkeys(["id", *data.extra_columns]))
    planned = []
    with Stage("plan", len(prepared.files)) as stage:
        for plan in pipeline.plan_parts(prepared.files, data.part_bytes, encoding, wanted):
            planned.append(plan)
            stage.advance()
    parts = sorted((Part(**part) for plan in planned for part in plan["parts"]), key=lambda p: (p.label, p.start))
    if not parts:
        raise UserError(f"data.path {', '.join(data.path)}: the files hold no rows")
    return parts, extra_types((plan["kinds"] for plan in planned), wanted)


def _encode(
    prepared: Prepared, config: Config, parts: list[Part], extra: dict[str, pa.DataType], timings: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Part name → summary, in the order of the input."""
    summaries = {}
    with Stage("encode", len(parts)) as stage:
        for summary in pipeline.encode_parts(prepared.store, parts, prepared.encoder, config.data, extra):
            summaries[summary["part"]] = summary
            stage.advance(rows=summary["rows"], tokens=summary["tokens"])
        timings["encode_s"] = stage.seconds
    missing = [part.label for part in parts if part.name not in summaries]
    if missing:
        raise UserError(f"{missing[0]} changed while it was read: run the same command again")
    _check_rejected(summaries.values(), config, prepared.store)
    return {part.name: summaries[part.name] for part in parts}


def _check_rejected(summaries: Any, config: Config, store: Store) -> None:
    rows = sum(s["rows"] for s in summaries)
    reasons: Counter[str] = sum((Counter(s["rejected"]) for s in summaries), Counter())
    rejected = reasons.total()
    if rows == 0:
        raise UserError(f"data.path {', '.join(config.data.path)}: the files hold no rows")
    if not rejected:
        return
    commonest = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(3))
    if rejected > config.data.max_rejected * rows or rejected == rows:
        raise UserError(
            f"{rejected:,} of {rows:,} rows cannot be used, more than data.max_rejected = {config.data.max_rejected} "
            f"({commonest}); see {store.url}/rejected, mend the rows or raise the limit"
        )
    say(f"{rejected:,} of {rows:,} rows rejected ({commonest}), see {store.url}/rejected")


def _score(
    prepared: Prepared, config: Config, encoded: dict[str, dict[str, Any]], timings: dict[str, float]
) -> dict[str, str]:
    """Make the missing losses; returns base and reference → their folder."""
    gpu = pipeline.has_gpu()
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    specs = {"base": prepared.base, "reference": prepared.reference}
    folders = {role: f"losses/{spec.name}-{dtype}" for role, spec in specs.items()}
    models = list({folders[role]: spec for role, spec in specs.items()}.items())
    together = config.score.colocate
    if together == "auto":
        sizes = {spec.path: spec.bytes for spec in specs.values()}
        together = sum(sizes.values()) <= COLOCATE_BYTES * (config.score.gpus_per_actor if gpu else 1)
    if prepared.reference.adapter:
        together = True  # the adapter lies over the base, which is loaded in any case
    began = time.monotonic()
    tokens = {part: s["tokens"] for part, s in encoded.items() if s["tokens"]}
    for members in [models] if together else [[model] for model in models]:
        done = [prepared.store.part_names(folder) for folder, _ in members]
        missing = {part: count for part, count in tokens.items() if not all(part in names for names in done)}
        with Stage("score", len(missing), sum(missing.values())) as stage:
            noted: set[str] = set()
            pool = [(spec, folder) for folder, spec in members]
            for result in pipeline.score_parts(prepared.store, pool, missing, config.score, dtype, gpu):
                stage.advance(rows=result["rows"], tokens=result["tokens"])
                for folder in set(result["full_logits"]) - noted:
                    noted.add(folder)
                    say(f"{folder}: the model's logits are not a plain head over its body, so full logits are computed")
    timings["score_s"] = time.monotonic() - began
    return folders


def _select(
    store: Store,
    config: Config,
    encoded: dict[str, dict[str, Any]],
    losses: dict[str, str],
    timings: dict[str, float],
) -> tuple[str, str, list[dict[str, Any]]]:
    """Find the cut and publish the masked rows. Returns the selection's name, the snapshot and the summaries."""
    select = config.select
    parts = [part for part, summary in encoded.items() if summary["response_tokens"]]
    identity = json.dumps([parts, losses, select.model_dump(mode="json")], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:8]
    name = f"{select.scorer}-{select.scope}-{select.keep_ratio:g}-{fingerprint}"
    file = f"selections/{name}/threshold.json"
    began = time.monotonic()
    threshold = store.read_json(file)
    if threshold is None:
        tokens = sum(summary["response_tokens"] for summary in encoded.values())
        threshold = {"tokens": tokens, "losses": losses, "select": select.model_dump(mode="json")}
        if select.scope == "global":
            k = selection.keep_count(select.keep_ratio, tokens)
            if k == 0:
                ratio = select.keep_ratio
                raise UserError(f"select.keep_ratio {ratio} keeps none of {tokens} response tokens: raise it")
            found = pipeline.find_cut(store, parts, losses, select, k)
            threshold |= {"k": k, "cut": asdict(found), "score": found.score}
        # the claim on a snapshot is written before its first file, so that a resumed run goes on in the same folder
        threshold["snapshot"] = _next_snapshot(store)
        store.write_json(file, threshold)
    timings["select_s"] = time.monotonic() - began

    snapshot = threshold["snapshot"]
    cut = selection.Cut(**threshold["cut"]) if "cut" in threshold else None
    published = []
    with Stage("publish", len(parts)) as stage:
        for summary in pipeline.publish_parts(store, f"masked/{snapshot}", parts, losses, select, cut):
            published.append(summary)
            stage.advance(rows=summary["rows"])
        timings["publish_s"] = stage.seconds
    sources = _sum_sources(published)
    kept = sum(kept for _, kept in sources.values())
    if cut and kept != threshold["k"]:
        raise AssertionError(f"{kept} tokens kept instead of {threshold['k']}")
    counts = {"kept": kept, "near": sum(s["near"] for s in published), "ties": sum(s["ties"] for s in published)}
    threshold |= {**counts, "sources": {s: {"tokens": n, "kept": k} for s, (n, k) in sources.items()}}
    store.write_json(file, threshold)
    store.write_json(f"masked/{snapshot}/manifest.json", {"selection": name, "parts": parts})
    store.write_json("masked/latest.json", {"snapshot": snapshot, "selection": name})
    return name, snapshot, published


def _next_snapshot(store: Store) -> str:
    taken = set(store.folders("masked"))
    for name in store.folders("selections"):
        taken.add((store.read_json(f"selections/{name}/threshold.json") or {}).get("snapshot", ""))
    return f"v{max((int(name[1:]) for name in taken if name[:1] == 'v' and name[1:].isdigit()), default=0) + 1:04d}"


def _sum_sources(published: list[dict[str, Any]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for summary in published:
        for name, (tokens, kept) in summary["sources"].items():
            so_far = total.setdefault(name, [0, 0])
            so_far[0] += tokens
            so_far[1] += kept
    return dict(sorted(total.items()))


def _counts(encoded: dict[str, dict[str, Any]], published: list[dict[str, Any]]) -> dict[str, Any]:
    reasons: Counter[str] = sum((Counter(s["rejected"]) for s in encoded.values()), Counter())
    counts = {
        "rows": sum(s["rows"] for s in encoded.values()),
        "rejected": reasons.total(),
        "nothing_kept": sum(s["nothing_kept"] for s in published),
        "masked": sum(s["rows"] for s in published),
        "tokens": sum(s["tokens"] for s in encoded.values()),
        "response_tokens": sum(s["response_tokens"] for s in encoded.values()),
        "rejected_reasons": dict(reasons.most_common()),
    }
    if counts["rows"] != counts["rejected"] + counts["nothing_kept"] + counts["masked"]:
        raise AssertionError(f"rows were lost or doubled: {counts}")
    return counts
