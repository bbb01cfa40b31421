"""What a job's steps share: the run folder, the models, and encode → score; `masking` goes on from there.

Every function here first asks storage what is done and makes what is missing; the driver holds small summaries, so it
may die at any point and the same command goes on.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tokenclean_ray import __version__, metrics, pipeline, score_actors, scorers, vllm_check, workers
from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Config, Select
from tokenclean_ray.encode import Encoder, encoding_fingerprint
from tokenclean_ray.errors import UserError
from tokenclean_ray.held_out import HeldOut, held_out_statistics
from tokenclean_ray.input_files import list_files
from tokenclean_ray.layout import Damaged, Store, run_folder
from tokenclean_ray.lock import Lock, hold
from tokenclean_ray.models import ModelSpec, check_compatible, describe, load_tokenizer, vocabulary_fingerprint
from tokenclean_ray.parts import Splits, carried_types
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.schema import statistics_suffix
from tokenclean_ray.source import Part
from tokenclean_ray.storage import side_by_side, use_endpoint
from tokenclean_ray.trainable import check_settings

COLOCATE_BYTES = 24 << 30  # both models' weights and room for activations fit a 40 GB GPU

Summaries = dict[str, dict[str, Any]]
"""Part name → summary, in the order of the input."""
Losses = dict[str, str]
"""base and reference → the folder of their losses."""


@dataclass
class Run:
    """A checked config and what belongs to it."""

    config: Config
    store: Store
    base: ModelSpec
    reference: ModelSpec | None
    """None where it is to be trained."""
    encoder: Encoder
    tokenizer: str
    """Fingerprint of the vocabulary: masked datasets carry it."""
    lock: Lock
    command: str
    gpu: bool
    record: dict[str, Any]
    """What run.json will hold."""

    @property
    def dtype(self) -> str:
        """Of the models' weights."""
        if self.config.model.dtype != "auto":
            return self.config.model.dtype
        return "bfloat16" if self.gpu else "float32"

    def time(self, stage: str, seconds: float) -> None:
        """Add to a stage's time in run.json."""
        timings = self.record["timings"]
        timings[f"{stage}_s"] = round(timings.get(f"{stage}_s", 0.0) + seconds, 3)

    def save(self) -> None:
        """Commit run.json as it stands; a sweep has a file of its own, since run.json is of what was published."""
        self.store.write_record("sweep.json" if self.command == "sweep" else "run.json", self.record)


@contextlib.contextmanager
def open_run(config: Config, command: str) -> Iterator[Run]:
    """Check everything that can be checked without a cluster, lock the run folder, then join a cluster."""
    use_endpoint(config.endpoint_url)
    data = config.data
    for key in ("path", "warmup", "held_out"):
        list_files(getattr(data, key) or (), f"data.{key}")
    base = describe(str(config.model.base), trusted=config.model.trusts(str(config.model.base)))
    tokenizer = load_tokenizer(base.path, base.trusted, base.revision)
    name = config.model.reference
    reference = describe(name, base, config.model.trusts(name)) if name else None
    check_compatible(base, reference or base, tokenizer, data.max_length)
    if command == "evolve" or (reference is None and "reference" in scorers.models(config.select)):
        for start in {base, reference or base}:
            check_settings(start, config.train)
    if config.score.backend == "vllm":
        vllm_check.fit([base, reference or base], config.score, data.max_length)
    encoder = build_encoder(tokenizer, data.template, data.max_length, data.on_overflow)
    store = Store(run_folder(config.output))
    with hold(store, command) as lock:
        metrics.follow(store.url)
        workers.connect(config.endpoint_url)
        record = {
            "tokenclean": __version__,
            "config": config.model_dump(mode="json"),
            "versions": workers.versions(),
            "models": {"base": asdict(base)},
            "timings": {},
        }
        vocabulary, gpu = vocabulary_fingerprint(tokenizer), workers.on_gpu(config.model.device)
        run = Run(config, store, base, reference, encoder, vocabulary, lock, command, gpu, record)
        if "result" not in (store.read_json("run.json") or {}):  # what was published stays readable meanwhile
            run.save()
        yield run


def with_repairs(run: Run, job: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """Run a job; damaged files that it can make again are removed, and it is run once more, which makes them.

    Raises:
        UserError: damage to what was published, or to the same file twice.
    """
    seen: set[str] = set()
    while True:
        try:
            return job(run)
        except Damaged as error:
            folders = {file.rpartition("/")[0] for file in error.files if file.startswith("masked/")}
            published = {folder for folder in folders if run.store.read_json(f"{folder}/manifest.json")}
            for file, what in error.files.items():
                folder = file.rpartition("/")[0]
                if file in seen or not file.startswith(("encoded/", "losses/", "selections/", "masked/")):
                    raise
                if folder in published:
                    raise UserError(
                        f"{what} and was published, so no run changes it: delete {run.store.url}/{folder} and run the "
                        "same command again"
                    ) from error
                if file.endswith("/claim.json"):
                    raise
            for what in error.files.values():
                say(f"{what}: it is made again")
            list(side_by_side(run.store.delete, error.files))
            seen |= error.files.keys()


# -- encode ------------------------------------------------------------------------------------------------------


def encode(run: Run, paths: Iterable[str], splits: Splits) -> Summaries:
    """Input files → encoded parts, one file per part and split; each summary knows all `carried` columns' types."""
    data, names = run.config.data, ", ".join(paths)
    shaping = data.model_dump(include={"max_length", "on_overflow", "format", "columns", "turn_keys", "extra_columns"})
    encoding = hashlib.sha256(encoding_fingerprint(run.encoder, shaping).encode()).hexdigest()
    wanted = list(dict.fromkeys(["id", *data.extra_columns]))
    files = list_files(paths)
    parts: list[Part] = []
    with Stage("plan", len(files)) as stage:
        for planned in pipeline.plan_parts(files, data.part_bytes, encoding):
            parts += planned
            stage.advance()
        run.time("plan", stage.seconds)
    parts.sort(key=lambda part: (part.label, part.start))
    found: Summaries = {}
    kinds: dict[str, set[str]] = {}  # of all parts: with many columns those of each would not fit the driver
    with Stage("encode", len(parts) * len(splits.names)) as stage:
        for summary in pipeline.encode_parts(run.store, parts, run.encoder, data, wanted, splits):
            for column, seen in summary.pop("kinds").items():
                kinds.setdefault(column, set()).update(seen)
            found[summary["part"]] = summary
            stage.advance(rows=summary["rows"], tokens=summary["tokens"])
        run.time("encode", stage.seconds)
    expected = [name for part in parts for name in splits.part_names(part.name)]
    if missing := set(expected) - set(found):
        raise UserError(f"{names} changed while it was read ({len(missing)} parts): run the same command again")
    carried = carried_types(kinds, wanted)
    summaries = {name: found[name] | {"carried": carried} for name in expected}
    _check_rejected(run, summaries, names)
    if cut := run.encoder.cut_short(*(sum(s[name] for s in found.values()) for name in ("full", "rows"))):
        say(cut)
    return summaries


def _check_rejected(run: Run, summaries: Summaries, names: str) -> None:
    rows, reasons = count_rows(summaries)
    rejected, limit = reasons.total(), run.config.data.max_rejected
    if rows == 0:
        raise UserError(f"{names}: the files hold no rows")
    if not rejected:
        return
    commonest = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(3))
    if rejected == rows:
        raise UserError(
            f"none of {rows:,} rows can be used ({commonest}); see {run.store.url}/rejected, and mend the rows, "
            "data.format or data.columns"
        )
    if rejected > limit * rows:
        raise UserError(
            f"{rejected:,} of {rows:,} rows cannot be used, more than data.max_rejected = {limit} "
            f"({commonest}); see {run.store.url}/rejected, mend the rows or raise the limit"
        )
    say(f"{rejected:,} of {rows:,} rows rejected ({commonest}), see {run.store.url}/rejected")


def with_tokens(summaries: Summaries) -> list[str]:
    """The parts that have something to select from."""
    return [part for part, summary in summaries.items() if summary["response_tokens"]]


def count_rows(summaries: Summaries) -> tuple[int, Counter[str]]:
    """Input rows, and rejected rows by reason."""
    reasons: Counter[str] = sum((Counter(s["rejected"]) for s in summaries.values()), Counter())
    return sum(s["input_rows"] for s in summaries.values()), reasons


# -- score -------------------------------------------------------------------------------------------------------


def losses_folder(run: Run, select: Select, role: str, model: ModelSpec) -> str:
    """Where a model's losses lie; a model in another precision, or another backend's, is another model.

    What the scorer reads of base or reference, the model's role, beside the losses lies with them, in a folder of its
    own.
    """
    more = statistics_suffix(scorers.beside_losses(select, role))
    return f"losses/{model.name}-{run.dtype}{vllm_check.folder_suffix(run.config.score)}{more}"


def losses_of(run: Run, select: Select, models: dict[str, ModelSpec]) -> Losses:
    """Where the losses lie that the scorer reads, of those of base and reference."""
    return {role: losses_folder(run, select, role, models[role]) for role in sorted(scorers.models(select))}


def score(run: Run, named: dict[str, ModelSpec], parts: Summaries) -> None:
    """Make the missing losses of some parts.

    Args:
        named: folder of losses → model.
    """
    settings = run.config.score
    together = settings.colocate
    if settings.backend == "vllm":
        settings = vllm_check.fit(list(named.values()), settings, run.config.data.max_length)
        together = False  # an engine takes whole GPUs
    elif together == "auto":
        sizes = {model.path: model.bytes for model in named.values()}
        together = sum(sizes.values()) <= COLOCATE_BYTES * (settings.gpus_per_actor if run.gpu else 1)
    tokens = {part: summary["tokens"] for part, summary in parts.items() if summary["tokens"]}
    pool = [(model, folder) for folder, model in named.items()]
    by_path: dict[str, list[tuple[ModelSpec, str]]] = {}  # an adapter lies over the base, which is loaded once for both
    for model, folder in pool:
        by_path.setdefault(model.path, []).append((model, folder))
    began = time.monotonic()
    scoring = run.record.setdefault("scoring", {"actor_seconds": 0.0, "actor_memory": 0})  # all actors', one's bytes
    for members in [pool] if together else by_path.values():
        done = [run.store.part_names(folder) for _, folder in members]
        missing = {part: count for part, count in tokens.items() if not all(part in names for names in done)}
        if not missing:
            say(f"score      {len(tokens):,}/{len(tokens):,} parts were there")
            continue
        noted: set[str] = set()
        with Stage("score", len(missing), sum(missing.values())) as stage:
            for result in score_actors.score_parts(run.store, members, missing, settings, run.dtype, run.gpu):
                stage.advance(rows=result["rows"], tokens=result["tokens"])
                scoring["actor_seconds"] = round(scoring["actor_seconds"] + result["seconds"], 3)
                scoring["actor_memory"] = max(scoring["actor_memory"], result["memory"])
                if result["loaded"] is not None:
                    metrics.LOAD.observe(result["loaded"])
                if result["lowered"]:
                    metrics.RETRIES.inc()
                for line in _notes(result):
                    if line not in noted:
                        noted.add(line)
                        say(line)
    run.time("score", time.monotonic() - began)


def _notes(result: dict[str, Any]) -> list[str]:
    """What the user should know of how a part was scored."""
    full = "the model's logits are not a plain head over its body, so full logits are computed"
    less = "out of memory, so parts are scored again with a budget of {} tokens; to spare the attempt set"
    return [f"{folder}: {full}" for folder in result["full_logits"]] + [
        f"{folder}: {less.format(budget)} score.batch_tokens={budget}" for folder, budget in result["lowered"].items()
    ]


# -- held-out rows -----------------------------------------------------------------------------------------------


def judge(run: Run, parts: Summaries, model: ModelSpec, best: ModelSpec) -> HeldOut:
    """Score held-out parts under a model and compare it to another."""
    folders = [losses_folder(run, run.config.select, "reference", one) for one in (model, best)]
    score(run, dict(zip(folders, (model, best), strict=True)), parts)
    sums = pipeline.sum_losses(run.store, with_tokens(parts), *folders)
    return held_out_statistics(sums)
