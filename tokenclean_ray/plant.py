"""Tokens replaced on purpose, so that what finds noise can be checked against what is known. Pure numpy.

Input: flat rows. Output: the same rows with some tokens replaced, and which. Used by the study's tasks and by the
planted calibration of a run.
"""

import numpy as np

KINDS = ("random", "other_rows")
"""random: any of the candidates, drawn alike; other_rows: a response token of another row."""


def from_other_rows(
    ids: np.ndarray, usable: np.ndarray, offsets: np.ndarray, at: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """For each place a token of another row, drawn alike from all of them.

    Args:
        ids: token ids of all rows, one after another, (N,).
        usable: true for the tokens that may be drawn, (N,).
        offsets: row i is [offsets[i], offsets[i + 1]).
        at: the places, indices in the flat rows, (P,).

    Returns:
        (P,) token ids; a place's own token where no other row has a usable one.
    """
    pool = ids[usable]
    first = np.concatenate([[0], np.cumsum(usable)])[offsets]  # index in the pool of each row's first
    row = np.searchsorted(offsets, at, side="right") - 1
    own = (first[1:] - first[:-1])[row]
    others = len(pool) - own
    drawn = (random.random(len(at)) * others).astype(np.int64)
    drawn += np.where(drawn >= first[row], own, 0)  # step over the row's own tokens
    return np.where(others > 0, pool[np.minimum(drawn, len(pool) - 1)] if len(pool) else ids[at], ids[at])


def plant(
    ids: np.ndarray,
    places: np.ndarray,
    usable: np.ndarray,
    offsets: np.ndarray,
    shares: dict[str, float],
    candidates: np.ndarray,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace some tokens.

    Args:
        ids: token ids of all rows, (N,).
        places: true for the tokens that may be replaced, (N,).
        usable: true for the tokens that other rows may take, (N,).
        offsets: row i is [offsets[i], offsets[i + 1]).
        shares: kind, of `KINDS` → chance of each token to be replaced in that way; together at most 1.
        candidates: token ids that random noise is drawn from.

    Returns:
        the new ids (N,), and (N,) int8: 0 where a token is what it was, else 1 + the kind's place in `KINDS`.
    """
    drawn = random.random(len(ids))
    planted, kinds, start = ids.copy(), np.zeros(len(ids), np.int8), 0.0
    for kind, share in shares.items():
        at = np.flatnonzero(places & (drawn >= start) & (drawn < start + share))
        if kind == "random":
            planted[at] = random.choice(candidates, len(at))
        else:
            planted[at] = from_other_rows(ids, usable, offsets, at, random)
        kinds[at] = 1 + KINDS.index(kind)
        start += share
    return planted, np.where(planted != ids, kinds, 0).astype(np.int8)
