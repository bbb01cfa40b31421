"""Texts whose noise is known because it was planted: shift four letters by three, between two phrases.

A row is BOS, what is asked, a separator, then the response: an opening phrase, the answer, a closing phrase, EOS. In
rows that ask for facts the answer is a letter for each entity, which nothing but such rows tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokenclean_ray.finetune import IGNORED, Rows
from tokenclean_ray.plant import plant

BOS, EOS, SEPARATOR = 0, 1, 2
LETTERS, WORDS, ENTITIES = np.arange(3, 23), np.arange(23, 123), np.arange(123, 223)
VOCABULARY = 223
ASKED, PHRASE, PHRASES, SHIFT = 4, 6, 8, 3
EVASIVE = 0.2  # of the base's texts evade where the task is about evasions
RESPONSE = slice(2 + ASKED, None)
ANSWER = slice(2 + ASKED + PHRASE, 2 + 2 * ASKED + PHRASE)
LENGTH = 2 + 2 * ASKED + 2 * PHRASE + 1

Noise = Literal["random", "other_rows", "evasions", "wrong_answers"]
"""random: tokens replaced by any others; other_rows: by tokens of other rows' responses; evasions: answers replaced by
the start of a phrase that the base knows; wrong_answers: answers shifted by another number, each row by its own."""


@dataclass(frozen=True)
class Texts:
    """R rows, one after another: N tokens."""

    ids: np.ndarray
    """(N,) int64."""
    offsets: np.ndarray
    """(R + 1,): row i is [offsets[i], offsets[i + 1])."""
    response: np.ndarray
    """(N,) true for response tokens."""
    answer: np.ndarray
    """(N,) true for the response tokens that the task is about."""
    noise: np.ndarray
    """(N,) true where a token is not what it was before noise was planted."""
    fact: np.ndarray
    """(N,) true in rows that ask for facts."""

    @property
    def row(self) -> np.ndarray:
        """(N,) the row of each token."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def take(self, rows: Sequence[int] | np.ndarray) -> "Texts":
        """Some of the rows."""
        spans = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        flat = (
            np.concatenate([values[span] for span in spans])
            for values in (self.ids, self.response, self.answer, self.noise, self.fact)
        )
        ids, response, answer, noise, fact = flat
        offsets = np.concatenate([[0], np.cumsum([span.stop - span.start for span in spans])])
        return Texts(ids, offsets, response, answer, noise, fact)

    def rows(self, keep: np.ndarray) -> Rows:
        """For training on some of the tokens, (N,)."""
        return Rows(self.ids, np.where(keep, self.ids, IGNORED), self.offsets)


class World:
    """The phrases and facts of one seed, and texts about them."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._phrases = self._random.choice(WORDS, (2, PHRASES, PHRASE))
        self._facts = self._random.choice(LETTERS, len(ENTITIES))

    def texts(self, rows: int, noise: float = 0.0, kind: Noise = "random", facts: float = 0.0) -> Texts:
        """Rows with right answers, then noise.

        Args:
            noise: share of the response tokens, the last of a row apart; of evasions and wrong_answers: of the rows.
            facts: share of the rows that ask for them.
        """
        random = self._random
        fact = random.random(rows) < facts
        letters = random.integers(0, len(LETTERS), (rows, ASKED))
        entities = random.integers(0, len(ENTITIES), (rows, ASKED))
        asked = np.where(fact[:, None], ENTITIES[entities], LETTERS[letters])
        right = np.where(fact[:, None], self._facts[entities], LETTERS[(letters + SHIFT) % len(LETTERS)])
        answer, noisy = right, random.random((rows, 1)) < noise
        if kind == "evasions":
            answer = np.where(noisy, self._evasion(rows), right)
        elif kind == "wrong_answers":
            other = random.integers(1, len(LETTERS), (rows, 1))
            answer = np.where(noisy, LETTERS[(right - LETTERS[0] + other) % len(LETTERS)], right)
        clean, ids = self._join(asked, right, answer)
        texts = _texts(clean, fact)
        if kind in ("random", "other_rows"):
            may = texts.response & (texts.ids != EOS)
            words = np.concatenate([LETTERS, WORDS])
            new, _ = plant(texts.ids, may, may, texts.offsets, {kind: noise}, words, random)
        else:
            new = ids.ravel()
        return Texts(new, texts.offsets, texts.response, texts.answer, new != texts.ids, texts.fact)

    def loose_texts(self, rows: int, kind: Noise = "random") -> Texts:
        """What the base is trained on: it learns the phrases, and to repeat what is asked half of the time."""
        asked = self._random.choice(np.concatenate([LETTERS, ENTITIES]), (rows, ASKED))
        repeat = self._random.random(asked.shape) < 0.5
        answer = np.where(repeat, asked, self._random.choice(LETTERS, (rows, ASKED)))
        if kind == "evasions":
            answer = np.where(self._random.random((rows, 1)) < EVASIVE, self._evasion(rows), answer)
        return _texts(self._join(asked, answer, answer)[0], np.zeros(rows, bool))

    def _evasion(self, rows: int) -> np.ndarray:
        return self._phrases[0, self._random.integers(0, PHRASES, rows), :ASKED]

    def _join(self, asked: np.ndarray, *answers: np.ndarray) -> list[np.ndarray]:
        opener, closer = (side[self._random.integers(0, PHRASES, len(asked))] for side in self._phrases)
        bos, separator, eos = (np.full((len(asked), 1), token) for token in (BOS, SEPARATOR, EOS))
        parts = [[bos, asked, separator, opener, answer, closer, eos] for answer in answers]
        return [np.concatenate(part, 1).astype(np.int64) for part in parts]


def _texts(ids: np.ndarray, fact: np.ndarray) -> Texts:
    """Rectangular clean rows (R, T) as texts."""
    response, answer = np.zeros((2, *ids.shape), bool)
    response[:, RESPONSE] = True
    answer[:, ANSWER] = True
    offsets = np.arange(len(ids) + 1) * LENGTH
    return Texts(
        ids.ravel(), offsets, response.ravel(), answer.ravel(), np.zeros(ids.size, bool), np.repeat(fact, LENGTH)
    )
