"""`tokenclean estimate run.yaml --gpu h100`: what a run will cost, before any GPU is rented.

Input: a config, the base's tokenizer and config (no weights), a seeded sample of the data. Output: rows, tokens,
response share, floating-point operations, GPU-hours and disk, with the error that the sample leaves where it is known.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from tokenclean_ray import schema, scorers
from tokenclean_ray.calibrate import Z95, t95
from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Config
from tokenclean_ray.encode import Encoder, Tokens
from tokenclean_ray.errors import UserError
from tokenclean_ray.input_files import list_files
from tokenclean_ray.layout import parquet_bytes
from tokenclean_ray.models import empty_model, load_tokenizer, text_body
from tokenclean_ray.sampling import Chunk, Sample, sample_files
from tokenclean_ray.schema import RowError, commonest, list_column
from tokenclean_ray.storage import use_endpoint

# peak of dense bfloat16 matrix products, FLOP/s, from the vendors' data sheets
GPUS = {
    "a100": 312e12,
    "a10g": 70e12,
    "b200": 2250e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
    "l4": 121e12,
    "l40s": 362e12,
    "mi300x": 1307e12,
    "rtx4090": 165e12,
}
UTILISATION = (0.25, 0.4, 0.55)  # of that peak: assumed, not measured; low, middle and high
# what models call the number of their experts, and of those that a token is sent to
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ASKED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Total:
    """An estimated total and the half-width of its 95 % interval; infinite where one chunk cannot tell."""

    value: float
    error: float
    exact: bool
    """Whether every row was read."""

    def times(self, number: float) -> "Total":
        """So many of it."""
        return Total(number * self.value, number * self.error, self.exact)


@dataclass(frozen=True)
class Size:
    """What a pass over a model costs, in floating-point operations."""

    per_token: float
    """Of the body: two for each weight that a token meets."""
    per_pair: float
    """Of attention, for each pair of a token and one before it, as a share of a row's length squared."""
    per_answer_token: float
    """Of the head, which sees answer tokens only."""

    def forward(self, lengths: np.ndarray, answers: int) -> float:
        """One forward pass over rows of these lengths, with so many answer tokens in all."""
        pairs = (lengths**2).sum()
        return float(self.per_token * lengths.sum() + self.per_pair * pairs + self.per_answer_token * answers)


def model_size(path: str, trusted: bool = False) -> Size:
    """A model's operations, from its config alone.

    Weights of experts count by the share that a token is sent to; a causal attention kernel does half of the square.
    """
    model = empty_model(path, trusted)
    text, body, head = model.config.get_text_config(), text_body(model), model.get_output_embeddings().weight
    embeddings = {id(m.weight) for m in body.modules() if isinstance(m, torch.nn.Embedding)}
    active = _first(text, ASKED_EXPERTS) / _first(text, EXPERTS)
    weights = sum(
        parameter.numel() * (active if ".experts." in name else 1)
        for name, parameter in body.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in embeddings and parameter is not head
    )
    heads = getattr(text, "num_attention_heads", 0)  # which Mamba has none of
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    return Size(2 * weights, 2 * text.num_hidden_layers * width, 2 * head.numel())


def _first(config: Any, names: tuple[str, ...]) -> int:
    """What a config has under the first of these names that it knows; 1 where it knows none."""
    return next((found for name in names if (found := getattr(config, name, None))), 1)


# -- counting ----------------------------------------------------------------------------------------------------

QUANTITIES = ("rows", "rejected", "tokens", "answer tokens", "FLOPs")  # of one forward pass


def count_chunk(
    chunk: Chunk, encoder: Encoder, size: Size, config: Config
) -> tuple[np.ndarray, list[Tokens], list[RowError]]:
    """The `QUANTITIES` of a chunk, its rows as tokens, and why others are rejected."""
    rows = encoder.encode_rows(chunk.rows, config.data.format, config.data.columns, config.data.turn_keys)
    encoded = [tokens for tokens in rows if not isinstance(tokens, RowError)]
    errors = [error for error in rows if isinstance(error, RowError)]
    lengths = np.array([len(ids) for ids, _ in encoded], np.float64)
    answers = sum(int(mask.sum()) for _, mask in encoded)
    counts = (len(chunk.rows), len(errors), lengths.sum(), answers, size.forward(lengths, answers))
    return np.array(counts, np.float64), encoded, errors


def totals(sample: Sample, counts: list[np.ndarray]) -> dict[str, Total]:
    """Exact where every row was seen; else all bytes times a ratio of the chunks' weighted sums, with the variance of
    its linearisation, as of draws with replacement (Cochran, Sampling Techniques, chapter 6)."""
    y = np.array(counts)
    if sample.complete:
        total, error = y.sum(0), np.zeros(y.shape[1])
    else:
        share = np.array([chunk.places for chunk in sample.chunks])[:, None]
        share = share / share.sum()
        per_byte = y / np.array([chunk.bytes for chunk in sample.chunks])[:, None]
        mean = (share * per_byte).sum(0)
        total = sample.total * mean
        n = len(y)
        variance = ((share * (per_byte - mean)) ** 2).sum(0) * n / (n - 1) if n > 1 else np.full(y.shape[1], np.inf)
        error = t95(max(1, n - 1)) * sample.total * np.sqrt(variance)
    values = zip(QUANTITIES, total, error, strict=True)
    return {name: Total(float(value), float(half), sample.complete) for name, value, half in values}


def disk_bytes(rows: list[Tokens], columns: int) -> float:
    """Bytes that the run writes for some rows: encoded, losses, masked; measured by writing them.

    Losses do not compress, so random ones stand in. So do random kept tokens, half of them: the worst case for labels.

    Args:
        columns: how many of losses, and of what lies beside them.
    """
    ids, mask = (np.concatenate(flat) for flat in zip(*rows, strict=True))
    offsets = np.cumsum([0, *(len(row) for row, _ in rows)])
    rng = np.random.default_rng(0)
    loss = np.where(mask, rng.exponential(size=len(ids)), 0).astype(np.float32)
    labels = np.where(mask & (rng.random(len(ids)) < 0.5), ids, -100)
    number = pa.array(range(len(rows)), pa.int32())
    tokens = list_column(ids, offsets, schema.TOKENS)
    losses = {"row": number, "loss": list_column(loss, offsets, schema.FLOATS)}
    files = [
        {"row": number, "input_ids": tokens, "response_mask": list_column(mask, offsets, schema.FLAGS)},
        {"row": number, "input_ids": tokens, "labels": list_column(labels, offsets, schema.TOKENS)},
        *[losses] * columns,
    ]
    return float(sum(len(parquet_bytes(pa.table(file))) for file in files))


# -- the estimate ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found."""

    counts: dict[str, Total]
    models: int
    """How many the scorer reads."""
    scoring_flops: Total
    training_flops: Total | None
    """Of a reference, where the scorer reads one that is not there."""
    disk: float
    """Bytes, roughly: how well rows compress depends on their neighbours, and a small part is half footer."""
    sampled_rows: int
    complete: bool
    rejected: str = ""
    """Why rows that were read are rejected, and whether that is too many; empty where none is."""
    cut: str = ""
    """How many rows that were read lose their end, where some do."""

    @property
    def flops(self) -> float:
        """All of them."""
        return self.scoring_flops.value + (self.training_flops.value if self.training_flops else 0)

    def gpu_hours(self, gpu: str) -> tuple[float, float, float]:
        """At high, middle and low utilisation."""
        low, middle, high = (self.flops / (GPUS[gpu] * share) / 3600 for share in reversed(UTILISATION))
        return low, middle, high


def estimate(config: Config) -> Estimate:
    """Sample the data of `tokenclean clean` and count.

    Raises:
        UserError: what `clean` would say of the data, the tokenizer or the template.
    """
    use_endpoint(config.endpoint_url)
    name = str(config.model.base)
    trusted = config.model.trusts(name)
    data = config.data
    tokenizer = load_tokenizer(name, trusted)
    encoder = build_encoder(tokenizer, data.template, data.max_length, data.on_overflow)
    size = model_size(name, trusted)
    models = scorers.models(config.select)
    counts, encoded, errors, sample = _count(data.path or (), encoder, size, config)
    if not encoded:
        raise UserError(f"none of {len(sample.rows):,} sampled rows can be used; {commonest(errors)}")
    training = None
    if "reference" in models and config.model.reference is None:
        train = config.train
        # backward: gradients of the activations, and of the weights where they are trained; adapters' own not counted
        passes = 2 + (train.method == "full") + train.activation_checkpointing
        # attention has no weights: its gradients are those of both sides of each product
        of_pairs = (3 + train.activation_checkpointing) / passes
        trained = replace(size, per_pair=size.per_pair * of_pairs)
        warmup, *_ = _count(data.warmup or (), encoder, trained, config)
        training = _trained(warmup, config).times(passes * train.epochs)
    usable = sum(len(ids) for ids, _ in encoded)
    columns = sum(1 + len(scorers.beside_losses(config.select, role)) for role in models)
    disk = disk_bytes(encoded, columns) / usable * counts["tokens"].value
    scoring = counts["FLOPs"].times(len(models))
    rejected = _rejected(errors, len(sample.rows), data.max_rejected)
    cut = encoder.cut_short(sum(len(ids) == data.max_length for ids, _ in encoded), len(encoded))
    return Estimate(counts, len(models), scoring, training, disk, len(sample.rows), sample.complete, rejected, cut)


def _rejected(errors: list[RowError], rows: int, limit: float) -> str:
    if not errors:
        return ""
    too_many = f"; more than data.max_rejected = {limit}, at which clean stops" if len(errors) > limit * rows else ""
    return f"rejected {len(errors):,} of {rows:,} rows read; {commonest(errors)}{too_many}"


def _trained(warmup: dict[str, Total], config: Config) -> Total:
    """FLOPs of the warm-up rows that are trained on; gate: auto holds some back by a hash, if it has no other rows."""
    flops, share = warmup["FLOPs"], config.evolve.held_out_share
    if config.select.gate != "auto" or config.data.held_out:
        return flops
    chance = Z95 * math.sqrt(share * (1 - share) / max(1.0, warmup["rows"].value)) * flops.value  # rows taken as alike
    return Total((1 - share) * flops.value, math.hypot((1 - share) * flops.error, chance), False)


def _count(
    paths: Iterable[str], encoder: Encoder, size: Size, config: Config
) -> tuple[dict[str, Total], list[Tokens], list[RowError], Sample]:
    sample = sample_files(list_files(paths), config.seed)
    counted = [count_chunk(chunk, encoder, size, config) for chunk in sample.chunks]
    counts, encoded, errors = zip(*counted, strict=True)
    return totals(sample, list(counts)), list(chain(*encoded)), list(chain(*errors)), sample


def show(found: Estimate, gpu: str) -> None:
    """The estimate as a table, on standard output."""
    console = Console(highlight=False)
    table = Table("", box=None, header_style="bold")
    table.add_column("estimate", justify="right")
    table.add_column("± 95 %", justify="right")
    for name in QUANTITIES[:4]:
        total = found.counts[name]
        table.add_row(name, f"{total.value:,.0f}", _error(total))
    share = found.counts["answer tokens"].value / found.counts["tokens"].value
    table.add_row("response share", f"{share:.1%}", "exact" if found.complete else "about")
    flops = [(f"scoring FLOPs, {found.models} models", found.scoring_flops)]
    if found.training_flops:
        flops.append(("training FLOPs, reference", found.training_flops))
    for name, total in flops:
        table.add_row(name, f"{total.value:.3g}", _error(total))
    low, middle, high = found.gpu_hours(gpu)
    table.add_row(f"GPU-hours on {gpu}", f"{middle:.3g}", f"{low:.3g} to {high:.3g}")
    table.add_row("disk: rows, losses, masks", _bytes(found.disk), "about")
    console.print(table)
    for line in filter(None, (found.rejected, found.cut)):
        console.print(line, soft_wrap=True, markup=False, emoji=False)
    kind = "all rows, so counts are exact" if found.complete else "a seeded sample; compressed files by their beginning"
    console.print(f"from {found.sampled_rows:,} rows: {kind}", soft_wrap=True)
    console.print(
        f"{gpu}: {GPUS[gpu] / 1e12:,.0f} TFLOP/s of dense bfloat16 (data sheet), {UTILISATION[1]:.0%} of it assumed, "
        f"{UTILISATION[2]:.0%} to {UTILISATION[0]:.0%} for the range; loading models comes on top",
        soft_wrap=True,
    )


def _error(total: Total) -> str:
    if total.exact:
        return "exact"
    if not math.isfinite(total.error):
        return "unknown"
    return f"{total.error / total.value:.1%}" if total.value else "none seen"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
