"""Texts whose noise is known because it was planted: shift four letters by three, between two phrases.

A row is BOS, what is asked, a separator, then the response: an opening phrase, the answer, a closing phrase, EOS. In
rows that ask for facts the answer is a letter for each entity, which nothing but such rows tells.
"""

from dataclasses import dataclass

import numpy as np

from tokenclean_ray.finetune import IGNORED, Rows

BOS, EOS, SEPARATOR = 0, 1, 2
LETTERS, WORDS, ENTITIES = np.arange(3, 23), np.arange(23, 123), np.arange(123, 223)
VOCABULARY = 223
ASKED, PHRASE, PHRASES, SHIFT = 4, 6, 8, 3
ANSWER = slice(2 + ASKED + PHRASE, 2 + 2 * ASKED + PHRASE)
LENGTH = 2 + 2 * ASKED + 2 * PHRASE + 1


@dataclass(frozen=True)
class Texts:
    """R rows of `LENGTH` tokens."""

    ids: np.ndarray
    """(R, T) int64."""
    noise: np.ndarray
    """(R, T) true where a response token was replaced by another."""
    fact: np.ndarray
    """(R,) true where a row asks for facts."""

    def __getitem__(self, rows: slice) -> "Texts":
        return Texts(self.ids[rows], self.noise[rows], self.fact[rows])

    @property
    def response(self) -> np.ndarray:
        """(R, T) true for response tokens."""
        return np.broadcast_to(np.arange(LENGTH) >= 2 + ASKED, self.ids.shape)

    @property
    def offsets(self) -> np.ndarray:
        """Of the flat rows."""
        return np.arange(len(self.ids) + 1) * LENGTH

    def rows(self, keep: np.ndarray) -> Rows:
        """For training on some of the tokens, (R, T)."""
        return Rows(self.ids.ravel(), np.where(keep, self.ids, IGNORED).ravel(), self.offsets)


class World:
    """The phrases and facts of one seed, and texts about them."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._phrases = self._random.choice(WORDS, (2, PHRASES, PHRASE))
        self._facts = self._random.choice(LETTERS, len(ENTITIES))

    def texts(self, rows: int, noise: float = 0.0, facts: float = 0.0) -> Texts:
        """Rows with right answers, then noise."""
        fact = self._random.random(rows) < facts
        letters = self._random.integers(0, len(LETTERS), (rows, ASKED))
        entities = self._random.integers(0, len(ENTITIES), (rows, ASKED))
        asked = np.where(fact[:, None], ENTITIES[entities], LETTERS[letters])
        answer = np.where(fact[:, None], self._facts[entities], LETTERS[(letters + SHIFT) % len(LETTERS)])
        return self._plant(self._join(asked, answer), fact, noise)

    def loose_texts(self, rows: int) -> Texts:
        """What the base is trained on: it learns the phrases, and to repeat what is asked half of the time."""
        asked = self._random.choice(np.concatenate([LETTERS, ENTITIES]), (rows, ASKED))
        repeat = self._random.random(asked.shape) < 0.5
        ids = self._join(asked, np.where(repeat, asked, self._random.choice(LETTERS, (rows, ASKED))))
        return self._plant(ids, np.zeros(rows, bool), 0.0)

    def _join(self, asked: np.ndarray, answer: np.ndarray) -> np.ndarray:
        opener, closer = (side[self._random.integers(0, PHRASES, len(asked))] for side in self._phrases)
        bos, separator, eos = (np.full((len(asked), 1), token) for token in (BOS, SEPARATOR, EOS))
        return np.concatenate([bos, asked, separator, opener, answer, closer, eos], 1).astype(np.int64)

    def _plant(self, ids: np.ndarray, fact: np.ndarray, share: float) -> Texts:
        replaced = self._random.random(ids.shape) < share
        replaced[:, : 2 + ASKED] = replaced[:, -1] = False
        noisy = np.where(replaced, self._random.choice(np.concatenate([LETTERS, WORDS]), ids.shape), ids)
        return Texts(noisy, noisy != ids, fact)
