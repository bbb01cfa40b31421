"""All Ray Data wiring: each function runs one stage over parts and yields one small result per part.

What a stage makes is committed to the run folder by the worker that made it; only summaries reach the driver. A
stage may be run again at any time: parts that are done are skipped.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy
from transformers.utils import logging as transformers_logging

from tokenclean_ray import schema, selection
from tokenclean_ray.config import Data, Score, Select, UserError
from tokenclean_ray.encode import Encoder
from tokenclean_ray.formats import to_messages
from tokenclean_ray.layout import Store
from tokenclean_ray.models import ModelSpec, load_adapter, load_model
from tokenclean_ray.score import flat_lists, list_column, score_table
from tokenclean_ray.source import Part, RawRow, RowError, plan_file, read_parts, work_items
from tokenclean_ray.token_loss import TokenLoss, token_loss_for

MAX_BLOCKS = 4096  # Ray Data's bookkeeping is per block; a block is what is tried again after a fault

Result = dict[str, Any]


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or the machine names, or start one here; quiet."""
    if not ray.is_initialized():
        # workers tokenize in parallel to each other, and never fetch what the driver has not checked
        ray.init(
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _run(items: list[Any], work: Any, blocks: int = MAX_BLOCKS, **how: Any) -> Iterator[Result]:
    """Map JSON-able items to results on the cluster, in any order.

    Args:
        work: a function, or a class whose instances are called, from a batch of the column `item` to a batch.
        how: for `map_batches`.
    """
    if not items:
        return
    dataset = ray.data.from_items(
        [{"item": json.dumps(item)} for item in items], override_num_blocks=min(len(items), blocks)
    )
    try:
        yield from dataset.map_batches(work, **how).iter_batches(batch_size=None, prefetch_batches=0)
    except ray.exceptions.RayError as error:
        mendable = _user_error(error)
        if mendable is None:
            raise
        raise mendable from error


def _user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` of a worker's code, which Ray wraps, in whatever depth it lies."""
    while error is not None:
        if isinstance(error, UserError):
            return UserError(*error.args)
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _each(function: Any) -> Any:
    """A function from an item to a list of results → one from batches to batches."""

    def work(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"result": [json.dumps(result) for item in batch["item"] for result in function(json.loads(item))]}

    return work


def _results(batches: Iterator[Result]) -> Iterator[Result]:
    for batch in batches:
        yield from (json.loads(result) for result in batch["result"])


# -- plan --------------------------------------------------------------------------------------------------------


def plan_parts(files: list[tuple[str, str]], part_bytes: int, encoding: str, extra: list[str]) -> Iterator[Result]:
    """Cut files into parts. Yields, per file, `parts` (list of dicts of `Part`) and `kinds`, see `plan_file`."""

    def plan(item: list[str]) -> list[Result]:
        plan = plan_file(item[0], item[1], part_bytes, encoding, extra)
        return [{"parts": [asdict(part) for part in plan["parts"]], "kinds": plan["kinds"]}]

    yield from _results(_run([list(file) for file in files], _each(plan), batch_size=1))


# -- encode ------------------------------------------------------------------------------------------------------


def encode_parts(
    store: Store, parts: list[Part], encoder: Encoder, data: Data, extra: dict[str, pa.DataType]
) -> Iterator[Result]:
    """Rows → encoded/ and rejected/. Yields each part's summary, whether it was done before or not.

    A summary has `part`, `rows`, `rejected` (reason → count), `tokens`, `response_tokens`.
    """
    encoder_ref = ray.put(encoder)
    done = store.part_names("encoded")

    def encode(item: dict[str, Any]) -> list[Result]:
        parts = [Part(**part) for part in item["parts"]]
        if item["done"]:
            return [store.read_summary("encoded", part.name) for part in parts]
        encoder: Encoder = ray.get(encoder_ref)
        return [
            encode_part(store, part, rows, encoder, data, extra) for part, rows in read_parts(parts, data.part_bytes)
        ]

    items = [
        {"done": is_done, "parts": [asdict(part) for part in group]}
        for is_done in (True, False)
        for group in work_items(part for part in parts if (part.name in done) is is_done)
    ]
    yield from _results(_run(items, _each(encode), batch_size=1))


def encode_part(
    store: Store, part: Part, rows: list[RawRow], encoder: Encoder, data: Data, extra: dict[str, pa.DataType]
) -> Result:
    """Encode one part's rows, commit what was rejected, then what was encoded; returns the summary."""
    texts, spans, kept, rejected = [], [], [], []
    for row in rows:
        try:
            if row.value is None:
                raise row.error or RowError("unreadable")
            carried = _carried(row.value, part, data.columns, extra)
            text, row_spans = encoder.render(*to_messages(row.value, data.format, data.columns))
            texts.append(text)
            spans.append(row_spans)
            kept.append((row, carried))
        except RowError as error:
            rejected.append((row, error))
    columns: dict[str, list[Any]] = {name: [] for name in schema.encoded(extra).names}
    for (row, carried), tokens in zip(kept, encoder.encode(texts, spans), strict=True):
        if isinstance(tokens, RowError):
            rejected.append((row, tokens))
            continue
        for name, value in carried.items():
            columns[name].append(value)
        columns["row"].append(row.row)
        columns["input_ids"].append(tokens[0])
        columns["response_mask"].append(tokens[1])
    summary = {
        "part": part.name,
        "rows": len(rows),
        "rejected": dict(Counter(error.reason for _, error in rejected)),
        "tokens": sum(map(len, columns["input_ids"])),
        "response_tokens": int(sum(mask.sum() for mask in columns["response_mask"])),
    }
    if rejected:
        rejected.sort(key=lambda item: item[0].row)
        table = pa.Table.from_pylist([_rejection(part, row, error) for row, error in rejected], schema.REJECTED)
        store.write_part("rejected", part.name, table, {"rows": len(rejected)})
    store.write_part("encoded", part.name, pa.table(columns, schema.encoded(extra)), summary)
    return summary


def _carried(row: dict[str, Any], part: Part, columns: dict[str, str], extra: dict[str, pa.DataType]) -> dict[str, Any]:
    source = row.get(columns.get("source", "source"))
    carried: dict[str, Any] = {"source": source if isinstance(source, str) and source else part.label}
    for name, kind in extra.items():
        value = row.get(name)
        if value is not None and pa.types.is_string(kind) and not isinstance(value, str):
            value = json.dumps(value, default=str, ensure_ascii=False)
        try:
            carried[name] = pa.scalar(value, kind).as_py()
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise RowError(f"column {name} is not {kind} as in the other rows", str(error)) from error
    return carried


def _rejection(part: Part, row: RawRow, error: RowError) -> dict[str, Any]:
    text = row.text.decode("utf-8", "replace")
    return {"row": row.row, "file": part.label, "line": row.line, "reason": error.reason, "detail": error.detail,
            "text": text}  # fmt: skip


# -- score -------------------------------------------------------------------------------------------------------


class ScoreParts:
    """An actor that holds the models and turns encoded/ into losses/<model>/, part by part."""

    def __init__(self, store: Store, models: list[tuple[ModelSpec, str]], dtype: str, score: Score, gpu: bool) -> None:
        """`models`: each model and the folder of its losses."""
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if not gpu:
            # not as many as there are cores: a loss must not depend on how many actors share them
            torch.set_num_threads(score.cpus_per_actor)
        self._store, self._models, self._batch_tokens = store, models, score.batch_tokens
        self._loaded: dict[str, Any] = {}
        self._losses: dict[str, TokenLoss] = {}
        self._error: UserError | None = None
        device = ("auto" if score.gpus_per_actor > 1 else "cuda") if gpu else "cpu"
        try:
            for path in {spec.path for spec, _ in models}:
                self._loaded[path] = load_model(path, getattr(torch, dtype), device)
            for spec, folder in models:
                self._losses[folder] = self._loss_of(spec)
        except UserError as error:
            self._error = error  # Ray would report a failed actor without its cause; the first call tells it

    def _loss_of(self, spec: ModelSpec) -> TokenLoss:
        if spec.adapter is None:
            return token_loss_for(self._loaded[spec.path])
        # the base's modules are shared: the adapter is off but while it is asked for, see _score
        self._loaded[spec.adapter] = load_adapter(self._loaded[spec.path], spec.adapter)
        return token_loss_for(self._loaded[spec.adapter].get_base_model())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Score the parts of a batch."""
        if self._error:
            raise self._error
        return {"result": [json.dumps(self._score(json.loads(item))) for item in batch["item"]]}

    def _score(self, item: Result) -> Result:
        part = item["part"]
        encoded = self._store.read_part("encoded", part, ["row", "input_ids", "response_mask"])
        for spec, folder in self._models:
            if folder not in item["folders"]:
                continue
            peft = [self._loaded[s.adapter] for s, _ in self._models if s.adapter]
            with peft[0].disable_adapter() if peft and spec.adapter is None else nullcontext():
                losses = score_table(self._losses[folder], encoded, self._batch_tokens)
            self._store.write_part(folder, part, losses, {"rows": losses.num_rows})
        full_logits = [folder for folder, loss in self._losses.items() if loss.full_logits]
        return {"part": part, "rows": encoded.num_rows, "tokens": item["tokens"], "full_logits": full_logits}


def score_parts(
    store: Store, models: list[tuple[ModelSpec, str]], tokens: dict[str, int], score: Score, dtype: str, gpu: bool
) -> Iterator[Result]:
    """Missing losses of parts under one pool of actors that hold all the given models.

    Args:
        models: each with the folder of its losses.
        tokens: part → number of tokens, for the parts to score.

    Yields:
        per part `rows`, `tokens` and `full_logits`, the folders whose model needed them.
    """
    done = {folder: store.part_names(folder) for _, folder in models}
    items = [
        {"part": part, "tokens": count, "folders": [f for f in done if part not in done[f]]}
        for part, count in tokens.items()
        if any(part not in names for names in done.values())
    ]
    if not items:
        return
    low, high = pool_size(score, gpu, len(items), sum({s.path: s.bytes for s, _ in models}.values()))
    resources = {"num_gpus": score.gpus_per_actor, "num_cpus": 1} if gpu else {"num_cpus": score.cpus_per_actor}
    pool = ActorPoolStrategy(size=low) if low == high else ActorPoolStrategy(min_size=low, max_size=high)
    arguments = {"store": store, "models": models, "dtype": dtype, "score": score, "gpu": gpu}
    yield from _results(
        _run(items, ScoreParts, fn_constructor_kwargs=arguments, batch_size=1, compute=pool, **resources)
    )


def pool_size(score: Score, gpu: bool, parts: int, model_bytes: int) -> tuple[int, int]:
    """Fewest and most actors, by the config and by what the cluster has."""
    if isinstance(score.num_actors, tuple):
        return score.num_actors
    if score.num_actors != "auto":
        return score.num_actors, score.num_actors
    kind, wanted = ("GPU", score.gpus_per_actor) if gpu else ("CPU", score.cpus_per_actor)
    have = ray.cluster_resources()
    room = int(have[kind]) // wanted
    if room == 0:
        raise UserError(f"score.{kind.lower()}s_per_actor is {wanted}, but the cluster has {have[kind]:.0f} {kind}s")
    if not gpu:
        # float32 weights, twice what bfloat16 files hold, and at most half of the memory for them
        room = max(1, min(room, int(have.get("memory", 0) / 2 / max(2 * model_bytes, 1 << 28))))
    size = min(room, parts)
    return size, size


# -- select ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartTokens:
    """A part's rows and its N response tokens, in order."""

    part: str
    encoded: pa.Table
    at: np.ndarray
    """(N,) index in the flat rows."""
    row: np.ndarray
    """(N,) index of the row in the table."""
    position: np.ndarray
    """(N,) index in the row."""
    score: np.ndarray
    """(N,) float32, nats."""
    key: np.ndarray
    """(N,) uint32, the score's place in the order."""

    def mix(self, of: np.ndarray) -> np.ndarray:
        """What orders ties, for some of the tokens."""
        return selection.mix(self.part, self.row_numbers[self.row[of]], self.position[of])

    @property
    def row_numbers(self) -> np.ndarray:
        """The rows' numbers in the part: with the part's name their identity."""
        return self.encoded["row"].to_numpy()


def part_tokens(store: Store, part: str, losses: dict[str, str], select: Select) -> PartTokens:
    """Read a part's rows and losses and score its response tokens.

    Args:
        losses: base and reference → the folder of their losses.

    Raises:
        UserError: losses that do not fit the rows, or scores that are no numbers, naming the rows.
    """
    encoded = store.read_part("encoded", part)
    mask, offsets = flat_lists(encoded["response_mask"])
    at = np.flatnonzero(mask)
    row = np.searchsorted(offsets, at, side="right") - 1
    statistics = []
    for folder in losses.values():
        table = store.read_part(folder, part)
        values, loss_offsets = flat_lists(table["loss"])
        if not table["row"].equals(encoded["row"]) or not np.array_equal(loss_offsets, offsets):
            where = f"{store.url}/{folder}/{part}.parquet"
            raise UserError(f"{where} is of other rows: delete it and run the same command again")
        statistics.append(values[at])
    score = selection.SCORERS[select.scorer](*statistics)
    if np.isnan(score).any():
        rows = encoded["row"].to_numpy()[np.unique(row[np.isnan(score)])[:5]]
        raise UserError(
            f"the scores of {part}, rows {', '.join(map(str, rows))} … are not numbers: a model gives NaN losses; "
            "check its weights, or set model.dtype: float32"
        )
    return PartTokens(part, encoded, at, row, at - offsets[row], score, selection.order_key(score))


def find_cut(store: Store, parts: list[str], losses: dict[str, str], select: Select, k: int) -> selection.Cut:
    """The place of the k-th token over all parts; a few passes, each reduced to one histogram per worker's share."""

    def count(prefix: tuple[int, ...]) -> selection.Histogram:
        def work(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            total = np.zeros(1 << selection.DIGIT_BITS, np.int64)
            for item in batch["item"]:
                tokens = part_tokens(store, json.loads(item), losses, select)
                total += selection.histogram(tokens.key, tokens.mix, prefix)
            return {"histogram": total[None]}

        blocks = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        batches = _run(parts, work, blocks=blocks, batch_size=None)
        return sum((h for b in batches for h in b["histogram"]), np.zeros(1 << selection.DIGIT_BITS, np.int64))

    return selection.find_cut(count, k)


def publish_parts(
    store: Store,
    folder: str,
    parts: list[str],
    losses: dict[str, str],
    select: Select,
    cut: selection.Cut | None,
) -> Iterator[Result]:
    """Write the masked rows of each part to a snapshot folder; yields their summaries, done before or not.

    A summary has `rows` (published), `nothing_kept` (rows left out), `near` (tokens near the cut), `ties` (tokens
    with the cut's score) and `sources` (source → [response tokens, kept tokens]).
    """
    done = store.part_names(folder)

    def publish(part: str) -> list[Result]:
        if part in done:
            return [store.read_summary(folder, part)]
        return [publish_part(store, folder, part, losses, select, cut)]

    yield from _results(_run(parts, _each(publish), batch_size=1))


def publish_part(
    store: Store, folder: str, part: str, losses: dict[str, str], select: Select, cut: selection.Cut | None
) -> Result:
    """Mask one part's rows, commit them and return the summary."""
    tokens = part_tokens(store, part, losses, select)
    encoded = tokens.encoded
    if cut is None:
        mixes = tokens.mix(np.arange(len(tokens.key)))
        keep = selection.keep_per_row(tokens.key, mixes, tokens.row, select.keep_ratio)
    else:
        keep = selection.keep_global(tokens.key, tokens.mix, cut)
    ids, offsets = flat_lists(encoded["input_ids"])
    labels = np.full(len(ids), -100, np.int32)
    labels[tokens.at[keep]] = ids[tokens.at[keep]]
    kept_per_row = np.bincount(tokens.row[keep], minlength=encoded.num_rows)
    table = encoded.drop_columns("response_mask").append_column("labels", list_column(labels, offsets, schema.TOKENS))
    source = np.array(encoded["source"].to_pylist(), object)[tokens.row]
    summary = {
        "part": part,
        "rows": int((kept_per_row > 0).sum()),
        "nothing_kept": int((kept_per_row == 0).sum()),
        "near": int((np.abs(tokens.score - cut.score) <= selection.NEAR).sum()) if cut else 0,
        "ties": int((tokens.key == cut.key).sum()) if cut else 0,
        "sources": {s: [int((source == s).sum()), int(keep[source == s].sum())] for s in sorted(set(source))},
    }
    store.write_part(folder, part, table.filter(pa.array(kept_per_row > 0)), summary)
    return summary


def extra_types(kinds: Iterable[dict[str, list[str]]], wanted: Iterable[str]) -> dict[str, pa.DataType]:
    """Types of the carried columns: a column whose values differ in type, or are nested, is carried as JSON text."""
    seen: dict[str, set[str]] = {}
    for file in kinds:
        for column, names in file.items():
            seen.setdefault(column, set()).update(names)
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    return {
        column: types["float"]
        if seen.get(column) == {"int", "float"}
        else types.get("".join(seen.get(column, ())), pa.string())
        for column in wanted
        if column in seen or column != "id"
    }


def has_gpu() -> bool:
    """Whether the cluster has a GPU now."""
    return ray.cluster_resources().get("GPU", 0) > 0


def versions() -> dict[str, str]:
    """Of what decides the figures, for run.json."""
    return {name: version(name) for name in ("ray", "torch", "transformers", "pyarrow", "numpy")} | {
        "cpus": str(os.cpu_count())
    }
