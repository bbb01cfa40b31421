"""Real text for `tokenclean study`: a data file, a small model, noise planted in the answers.

Input: paths, and how many rows of each kind. Output: rows as `planted.Texts`, and the model to start from.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Train
from tokenclean_ray.errors import UserError
from tokenclean_ray.models import describe, load_model, load_tokenizer
from tokenclean_ray.plant import plant
from tokenclean_ray.planted import Noise, Texts
from tokenclean_ray.source import usable_rows
from tokenclean_ray.token_loss import TokenLoss, token_loss_for


@dataclass(frozen=True)
class Text:
    """A task of real text."""

    data: str
    """Rows for the base, the warm-up set, the guard and the pool."""
    test: str
    """Clean rows that models are measured on."""
    model: str
    """What the base is trained from: a folder."""
    template: str = "tulu"
    max_length: int = 256
    """Tokens; longer rows are left out, because the cost of small heads grows with the square."""
    learning_rate: float = 1e-3
    batch_rows: int = 8
    pretrain_epochs: int = 2
    warmup_epochs: int = 2
    guard_rows: int = 100
    test_rows: int = 200

    def recipe(self, epochs: int) -> Train:
        """How its models are trained."""
        return Train(method="full", learning_rate=self.learning_rate, batch_rows=self.batch_rows, epochs=epochs)


def describe_text(text: Text) -> dict[str, Any]:
    """A task of real text by what its files hold, wherever they lie."""
    named = {"model": describe(text.model).name}
    for key in ("data", "test"):
        file = Path(getattr(text, key))
        named[key] = f"{file.name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    return asdict(text) | named


def load(text: Text, pretrain: int, warmup: int, pool: int, seed: int) -> tuple[TokenLoss, dict[str, Texts]]:
    """The model, and clean rows: pretrain, warmup, guard, pool and test, drawn by the seed.

    Raises:
        UserError: too few rows, or a model or file that cannot be used.
    """
    random = np.random.default_rng(seed)
    rows = _encode(text, text.data)
    sizes = {"pretrain": pretrain, "warmup": warmup, "guard": text.guard_rows, "pool": pool}
    if len(rows.offsets) - 1 < sum(sizes.values()):
        raise UserError(f"{text.data} has {len(rows.offsets) - 1} usable rows, the study wants {sum(sizes.values())}")
    order = random.permutation(len(rows.offsets) - 1)
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = rows.take(order[start : start + size])
        start += size
    tests = _encode(text, text.test)
    found["test"] = tests.take(random.permutation(len(tests.offsets) - 1)[: text.test_rows])
    model = token_loss_for(load_model(text.model, torch.float32, "cpu"))
    return model, found


def _encode(text: Text, path: str) -> Texts:
    tokenizer = load_tokenizer(text.model)
    encoder = build_encoder(tokenizer, text.template, text.max_length, "reject")
    pairs = [row for row in encoder.encode_rows(usable_rows(path), "auto", {}) if isinstance(row, tuple)]
    if not pairs:
        raise UserError(f"{path}: no row can be encoded: look at them with tokenclean init")
    ids, response = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row, _ in pairs])])
    nothing = np.zeros(len(ids), bool)
    return Texts(ids.astype(np.int64), offsets, response, response, nothing, nothing)


def plant_noise(clean: Texts, vocabulary: int, noise: float, kind: Noise, seed: int) -> Texts:
    """Rows with a share of their response tokens replaced; the kinds that are about the made-up task are refused."""
    if kind not in ("random", "other_rows"):
        raise UserError(f"noise of the kind {kind} is of the made-up task: take random or other_rows")
    random = np.random.default_rng([seed, 1])
    may = clean.response
    ids, _ = plant(clean.ids, may, may, clean.offsets, {kind: noise}, np.arange(vocabulary), random)
    return Texts(ids, clean.offsets, clean.response, clean.answer, ids != clean.ids, clean.fact)
