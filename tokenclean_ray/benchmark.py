"""`tokenclean benchmark score|select`: how fast, beside what the machine can do and what people write first. No Ray.

Input: rows of a file, or made ones. Output: a table, and a line in a file of records. `score` measures the package's
scoring of a random model of a size that fits a laptop; `select` finds the exact cut of many tokens in Parquet files.
Every figure is a ratio within one run on one machine, or stands beside the machine's own.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenclean_ray import benchmark_select
from tokenclean_ray.batching import pad, plan_batches
from tokenclean_ray.benchmark_select import memory
from tokenclean_ray.config import Score, UserError
from tokenclean_ray.encode import build_encoder
from tokenclean_ray.estimate import Size, Total, model_size
from tokenclean_ray.sampling import sample_files
from tokenclean_ray.score import CPU_BATCH_TOKENS, score_statistics
from tokenclean_ray.source import RowError, list_files
from tokenclean_ray.token_loss import TokenLoss, token_loss_for

VOCABULARY = 16000
SIZE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 704}
BASELINE_ROWS = 6  # of a batch, as the paper's scripts have it


# -- the machine -------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What a matrix product, a copy in memory and a file come to here."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    flops = _rate(lambda: torch.mm(a, b), 2 * size**3, 2.0, device)
    source, target = (np.ones(1 << 27, np.uint8) for _ in range(2))
    copied = _rate(lambda: np.copyto(target, source), len(source), 0.5, "cpu")
    with tempfile.NamedTemporaryFile() as file:
        began = time.perf_counter()
        file.write(source.tobytes())
        file.flush()
        os.fsync(file.fileno())
        written = len(source) / (time.perf_counter() - began)
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "matmul_flops": flops,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "copy_bytes": copied,
        "disk_bytes": written,
    }


def _rate(work: Callable[[], Any], amount: float, seconds: float, device: str) -> float:
    """Amount a second, after a first call that does not count."""
    work()
    _wait(device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        _wait(device)
        calls += 1
    return calls * amount / (time.perf_counter() - began)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -- score -------------------------------------------------------------------------------------------------------


def score(data: str | None, rows: int, baseline: bool) -> dict[str, Any]:
    """Score rows under a random Llama; with `baseline` also as people write it first, on the same rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = _rows(data, rows)
    tokenizer = _tokenizer(texts)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **SIZE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = model_size(folder)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loss_of = token_loss_for(model.to(device, dtype))
    encoder = build_encoder(tokenizer, "tulu", 2048, "truncate")
    encoded = [row for row in encoder.encode_rows(texts, "auto", {}) if not isinstance(row, RowError)]
    ids, mask = (np.concatenate(flat) for flat in zip(*encoded, strict=True))
    offsets = np.cumsum([0, *(len(row) for row, _ in encoded)])
    record = {"rows": len(encoded), "tokens": len(ids), "response_tokens": int(mask.sum()), **machine(device)}
    budget = Score().batch_tokens if device == "cuda" else CPU_BATCH_TOKENS
    lengths, flops = np.diff(offsets), _flops(size, offsets, mask)

    def timed(work: Callable[[], np.ndarray], batches: list[np.ndarray]) -> tuple[dict[str, float], np.ndarray]:
        _wait(device)
        began = time.perf_counter()
        found = work()
        _wait(device)
        seconds = time.perf_counter() - began
        figures = {
            "seconds": seconds,
            "tokens_per_s": len(ids) / seconds,
            "useful_flops": flops / seconds,
            "share_of_peak": flops / seconds / record["matmul_flops"],
            "padding": sum(len(batch) * int(lengths[batch].max()) for batch in batches) / len(ids) - 1,
            "peak_memory": _memory(device),
        }
        return figures, found

    small = offsets[min(20, len(encoded))]
    score_statistics(loss_of, ids[:small], mask[:small], offsets[offsets <= small], budget)  # first calls cost more
    record["ours"], found = timed(
        lambda: score_statistics(loss_of, ids, mask, offsets, budget)[0], plan_batches(lengths, budget)
    )
    if baseline:
        in_order = np.split(np.arange(len(lengths)), range(BASELINE_ROWS, len(lengths), BASELINE_ROWS))
        plain, expected = timed(lambda: _as_written_first(loss_of, ids, offsets, in_order), in_order)
        record["baseline"] = plain
        record["times_baseline"] = record["ours"]["tokens_per_s"] / plain["tokens_per_s"]
        record["largest_difference"] = float(np.abs(found - expected)[mask].max())
    return record


def _flops(size: Size, offsets: np.ndarray, mask: np.ndarray) -> float:
    """Useful ones: real tokens in the body, response tokens in the head."""
    counts = {
        "tokens": offsets[-1],
        "tokens²": (np.diff(offsets).astype(float) ** 2).sum(),
        "answer tokens": mask.sum(),
    }
    return size.forward({name: Total(float(value), 0.0) for name, value in counts.items()})


def _memory(device: str) -> int:
    """Most bytes so far: of the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory()


def _as_written_first(
    loss_of: TokenLoss, ids: np.ndarray, offsets: np.ndarray, batches: list[np.ndarray]
) -> np.ndarray:
    """Each batch padded to its longest row, an attention mask, full logits, the loss of every position."""
    losses = np.zeros(len(ids), np.float32)
    with torch.no_grad():
        for rows in batches:
            starts, lengths = offsets[:-1][rows], np.diff(offsets)[rows]
            seen = np.arange(lengths.max()) < lengths[:, None]
            batch = torch.from_numpy(pad(ids, starts, lengths).astype(np.int64)).to(loss_of.device)
            attention = torch.from_numpy(seen.astype(np.int64)).to(loss_of.device)
            logits = loss_of.model(input_ids=batch, attention_mask=attention, use_cache=False).logits
            found = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none"
            )
            row, column = np.nonzero(seen[:, 1:])
            losses[starts[row] + column + 1] = found.cpu().numpy()[row, column]
    return losses


def _rows(data: str | None, count: int) -> list[dict[str, Any]]:
    """Rows of a file, or questions and answers of made-up words, as long as those of GSM8K."""
    if data is not None:
        rows = [row for row in sample_files(list_files([data]), 0).rows if isinstance(row, dict)][:count]
        if not rows:
            raise UserError(f"--data {data}: no row can be read")
        return rows
    random = np.random.default_rng(0)
    words = np.array(
        ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in random.integers(2, 9, 20000)]
    )
    weights = 1 / np.arange(1, len(words) + 1)
    lengths = np.maximum(random.normal((60, 110), (25, 45), (count, 2)).astype(int), 8)

    def text(length: int) -> str:
        return " ".join(random.choice(words, length, p=weights / weights.sum()))

    return [{"question": text(q), "answer": text(a)} for q, a in lengths]


def _tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 16,000 tokens, trained on the rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((json.dumps(row, ensure_ascii=False) for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# -- people ------------------------------------------------------------------------------------------------------


def run(what: str, data: str | None, rows: int, tokens: int, baseline: bool, record: str) -> None:
    """Measure, append the record, print it."""
    found = score(data, rows, baseline) if what == "score" else benchmark_select.select(tokens, os.cpu_count() or 1)
    versions = {name: version(name) for name in ("tokenclean-ray", "torch", "transformers", "numpy", "pyarrow")}
    line = {"benchmark": what, "data": data and Path(data).name, "versions": versions, **found}
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    _show(found)


UNITS = {"flops": ("GFLOP/s", 1e9), "bytes": ("GB/s", 1e9), "memory": ("GB", 1e9), "share_of_peak": ("%", 0.01)}
UNITS |= {"padding": ("%", 0.01), "seconds": ("s", 1), "times": ("times", 1)}


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table("", box=None, header_style="bold")
    table.add_column("", justify="right")
    for name, value in found.items():
        if isinstance(value, dict):
            for inner, figure in value.items():
                table.add_row(f"{name}: {inner.replace('_', ' ')}", _shown(inner, figure))
        elif value is not None:
            table.add_row(name.replace("_", " "), _shown(name, value))
    console.print(table)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    unit, scale = next((unit for key, unit in UNITS.items() if key in name), ("", 1))
    number = value / scale
    whole = number >= 1000 or (isinstance(value, int) and scale == 1)
    return f"{number:{',.0f' if whole else '.3g'}} {unit}".strip()
