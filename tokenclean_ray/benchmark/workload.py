"""What is measured: rows of a file, or made ones, and a random Llama, by default one that fits a laptop. Needs no Ray.

Output: a folder with the model and its tokenizer, and a store with the rows encoded.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tokenclean_ray import schema
from tokenclean_ray.batching import plan_batches
from tokenclean_ray.benchmark.machine import device_here, dtype_on
from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.errors import UserError
from tokenclean_ray.estimate import model_size
from tokenclean_ray.layout import Store
from tokenclean_ray.models import load_tokenizer
from tokenclean_ray.schema import RowError, list_column
from tokenclean_ray.source import usable_rows

VOCABULARY = 16000
SIZE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 704}
LENGTH = 2048
# of Llama 3.2, for GPUs
LARGE_VOCABULARY = 128_256
MODELS = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "tie_word_embeddings": True},
    "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "intermediate_size": 8192, "tie_word_embeddings": True},
}  # fmt: skip
SMALL = "13M"
LONG = (1.0, 25.0)  # questions and answers, of GSM8K's: most rows reach `LENGTH`
PART_ROWS = 2000  # as many as 1 MiB of GSM8K
TOKENIZER_ROWS = 10_000  # that it is trained on
BASELINE_ROWS = 6  # of a batch, as the paper's scripts have it

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Rows as tokens, and a model."""

    store: Store
    parts: list[str]
    """Of encoded/, in the order of the rows."""
    model: str
    """A folder."""
    ids: np.ndarray
    mask: np.ndarray
    """Response tokens."""
    offsets: np.ndarray
    """Row i is [offsets[i], offsets[i + 1])."""
    encode_s: float

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def figures(self) -> dict[str, int]:
        """How much there is."""
        return {"rows": len(self.lengths), "tokens": len(self.ids), "response_tokens": int(self.mask.sum())}

    @cached_property
    def flops(self) -> float:
        """Useful ones of a forward pass: real tokens in the body, response tokens in the head."""
        return model_size(self.model).forward(self.lengths, int(self.mask.sum()))

    def first(self, rows: int) -> "Workload":
        """The first rows alone; the parts of encoded/ stay as they are."""
        offsets = self.offsets[: rows + 1]
        return replace(self, ids=self.ids[: offsets[-1]], mask=self.mask[: offsets[-1]], offsets=offsets)

    def part_rows(self) -> list[np.ndarray]:
        """The rows of each part."""
        return np.array_split(np.arange(len(self.lengths)), len(self.parts))


def size_of(model: str) -> tuple[dict[str, Any], int]:
    """The size of a random model by its name, `SMALL` or one of `MODELS`, and its vocabulary.

    Raises:
        UserError: no such size.
    """
    if model not in (SMALL, *MODELS):
        raise UserError(f"--models {model}: no size of a random model; there are {SMALL}, {', '.join(MODELS)}")
    return (SIZE, VOCABULARY) if model == SMALL else (MODELS[model], LARGE_VOCABULARY)


def prepare(folder: Path, rows: list[Row], workers: int, model: str = SMALL, dtype: str | None = None) -> Workload:
    """Encode rows as a run does, in parts that share well among workers.

    Args:
        model: the folder of a model, or the size of a new one, see `size_of`.
        dtype: of a new one's weights; None for what models have on the device here.

    Raises:
        UserError: no row can be read, no such size, or a model without a tokenizer.
    """
    path = model if Path(model).is_dir() else str(folder / "model")
    if path != model:
        make_model(Path(path), rows, *size_of(model), dtype=dtype)
    tokenizer = load_tokenizer(path)
    encoder = build_encoder(tokenizer, "chat" if tokenizer.chat_template else "tulu", LENGTH, "truncate")
    began = time.perf_counter()
    encoded = [row for row in encoder.encode_rows(rows, "auto", {}) if not isinstance(row, RowError)]
    encode_s = time.perf_counter() - began
    if not encoded:
        raise UserError("--data: no row can be encoded")
    ids, mask = (np.concatenate(flat) for flat in zip(*encoded, strict=True))
    offsets = np.cumsum([0, *(len(row) for row, _ in encoded)])
    names = [f"part-{n}" for n in range(min(len(encoded), workers * -(-len(encoded) // (workers * PART_ROWS))))]
    work = Workload(Store(str(folder / "run")), names, path, ids, mask, offsets, encode_s)
    for name, members in zip(names, work.part_rows(), strict=True):
        here = slice(offsets[members[0]], offsets[members[-1] + 1])
        own = offsets[members[0] : members[-1] + 2] - offsets[members[0]]
        columns = {
            "row": pa.array(members, pa.int32()),
            "input_ids": list_column(ids[here], own, schema.TOKENS),
            "response_mask": list_column(mask[here], own, schema.FLAGS),
        }
        work.store.write_part("encoded", name, pa.table(columns), {})
    return work


def make_model(
    folder: Path, rows: list[Row], size: dict[str, Any], vocabulary: int, seed: int = 0, dtype: str | None = None
) -> None:
    """A random Llama, in `dtype` or as the device here holds it, and a byte-level BPE trained on the rows; of few rows
    that has fewer tokens than the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((json.dumps(row, ensure_ascii=False) for row in rows[:TOKENIZER_ROWS]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    set_seed(seed)
    config = LlamaConfig(vocab_size=max(vocabulary, len(fast)), max_position_embeddings=LENGTH, **size)
    with torch.device(device_here()):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype or dtype_on(device_here()))).save_pretrained(folder)


def read_rows(data: str | None, count: int, long: bool = False) -> list[Row]:
    """The first rows of a file, or questions and answers of made-up words, as long as those of GSM8K, or `LONG`."""
    if data is None:
        return made_rows(count, LONG if long else 1.0)
    found = list(islice(usable_rows(data), count))
    if not found:
        raise UserError(f"--data {data}: no row can be read")
    return found


def made_rows(count: int, length: float | tuple[float, float] = 1.0, seed: int = 0) -> list[Row]:
    """Questions and answers of made-up words; `length` 1 is that of GSM8K, of both or of each."""
    words, weights = _words()
    random = np.random.default_rng(seed)
    lengths = np.maximum((np.array(length) * random.normal((60, 110), (25, 45), (count, 2))).astype(int), 8)
    text = iter(random.choice(words, lengths.sum(), p=weights))
    return [
        {"question": " ".join(next(text) for _ in range(q)), "answer": " ".join(next(text) for _ in range(a))}
        for q, a in lengths
    ]


@cache
def _words() -> tuple[np.ndarray, np.ndarray]:
    """Made-up words, and how often each is."""
    random = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = np.array(["".join(random.choice(letters, n)) for n in random.integers(2, 9, 20_000)])
    weights = 1 / np.arange(1, len(words) + 1)
    return words, weights / weights.sum()


def padding(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of padding, of the real tokens."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches) / int(lengths.sum()) - 1


def planned(lengths: np.ndarray, members: list[np.ndarray], budget: int, least: int) -> list[np.ndarray]:
    """The micro-batches of each group of rows; `least` as of `plan_batches`, on a GPU."""
    least = least if device_here() == "cuda" else 0
    return [rows[batch] for rows in members for batch in plan_batches(lengths[rows], budget, least=least)]


def in_order(rows: np.ndarray) -> list[np.ndarray]:
    """Batches as people write them first."""
    return np.split(rows, range(BASELINE_ROWS, len(rows), BASELINE_ROWS))
