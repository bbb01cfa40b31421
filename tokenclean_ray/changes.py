"""What a snapshot holds that the one before it did not. Needs neither Ray nor torch.

Input: the parts of both in the run folder. Output: counts that add up over any partition, and how far the scores of new
rows are from those of the others.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from tokenclean_ray.config import Select
from tokenclean_ray.layout import Store
from tokenclean_ray.schema import flat_lists
from tokenclean_ray.selection import DIGIT_BITS, Histogram, first_digits
from tokenclean_ray.tokens import COUNTED, part_tokens

COUNTS = ("rows_new", "rows_removed", "rows_unchanged", "labels_gained", "labels_lost")
"""Labels are those of unchanged rows' tokens: gained by tokens that were masked before, lost by those that were not."""

MOST_PARTS = 64  # of one task, which holds a digest and a bit a token of them

Pair = tuple[list[str], list[str]]
"""Parts of the snapshot before and of the new one, between which rows are looked for."""


def pair_up(removed: Mapping[str, str], added: Mapping[str, str], both: Iterable[str]) -> list[Pair]:
    """Each part that both snapshots have with itself, the others by their file: one that grew has another last part.

    Of a file that changed in many parts, each `MOST_PARTS` are compared with those in the same place: a row that moved
    further counts as removed and new.

    Args:
        removed, added: part → its file, in the order of the file.
    """
    files: dict[str, Pair] = defaultdict(lambda: ([], []))
    for side, parts in enumerate((removed, added)):
        for part, file in parts.items():
            files[file][side].append(part)
    pairs: list[Pair] = [([part], [part]) for part in both]
    for _, (before, after) in sorted(files.items()):
        shared = min(len(before), len(after))
        near = shared + 1 if shared else 0  # what was one part may have become two
        for start in range(0, near, MOST_PARTS):
            stop = min(start + MOST_PARTS, near)
            pairs.append((before[start:stop], after[start:stop]))
        pairs += [([part], []) for part in before[near:]] + [([], [part]) for part in after[near:]]
    return pairs


def count_changes(
    store: Store, pair: Pair, folders: tuple[str, str], losses: dict[str, str], select: Select
) -> dict[str, np.ndarray]:
    """Changes from the parts before to those after; a row is the same where its tokens are.

    Args:
        folders: of the two snapshots.
        losses: base and reference → the folder of their losses, of the parts after.

    Returns:
        counts, (5,), in the order of `COUNTS`; known and new, the `Histogram` of the scores of unchanged and of new
        rows by the first 16 bits of their place in the order.
    """
    if pair[0] == pair[1]:
        (part,) = pair[1]
        return _count_relabelled(store, part, folders, losses, select)
    was, now = (_kept(store, folder, parts) for folder, parts in zip(folders, pair, strict=True))
    unchanged = was.keys() & now.keys()
    gained, lost = (sum((a[row] & ~b[row]).bit_count() for row in unchanged) for a, b in ((now, was), (was, now)))
    counts = [len(now) - len(unchanged), len(was) - len(unchanged), len(unchanged), gained, lost]
    is_new = np.fromiter((row not in was for row in now), bool, len(now))
    known, new = (np.zeros(1 << DIGIT_BITS, np.int64) for _ in range(2))
    for part in pair[1]:
        tokens = part_tokens(store, part, losses, select, COUNTED)
        of_new, is_new = is_new[: tokens.encoded.num_rows][tokens.row], is_new[tokens.encoded.num_rows :]
        known += first_digits(tokens.key[~of_new])
        new += first_digits(tokens.key[of_new])
    return {"counts": np.array(counts), "known": known, "new": new}


def _count_relabelled(
    store: Store, part: str, folders: tuple[str, str], losses: dict[str, str], select: Select
) -> dict[str, np.ndarray]:
    """`count_changes` of a part that both snapshots have: its rows are the same, whatever became of their labels."""
    tokens = part_tokens(store, part, losses, select, COUNTED)
    was, now = (_labels(store, folder, part) for folder in folders)
    gained, lost = (
        sum((bits & ~b.get(row, 0)).bit_count() for row, bits in a.items()) for a, b in ((now, was), (was, now))
    )
    counts = np.array([0, 0, tokens.encoded.num_rows, gained, lost])
    return {"counts": counts, "known": first_digits(tokens.key), "new": np.zeros(1 << DIGIT_BITS, np.int64)}


def _kept(store: Store, folder: str, parts: list[str]) -> dict[tuple[bytes, int], int]:
    """Row, in order → its kept tokens, a bit each. A row is known by its tokens and by how many rows with the same came
    before it."""
    kept: dict[tuple[bytes, int], int] = {}
    seen: Counter[bytes] = Counter()
    for part in parts:
        labels = _labels(store, folder, part)
        encoded = store.read_part("encoded", part, ["row", "input_ids"])
        for row, name in zip(encoded["row"].to_pylist(), _digests(encoded["input_ids"]), strict=True):
            seen[name] += 1
            kept[name, seen[name]] = labels.get(row, 0)
    return kept


def _labels(store: Store, folder: str, part: str) -> dict[int, int]:
    """Number of a masked row → its kept tokens, a bit each."""
    masked = store.read_part(folder, part, ["row", "labels"])
    labels, ends = flat_lists(masked["labels"])
    return {
        row: int.from_bytes(np.packbits(labels[start:stop] != -100).tobytes())
        for row, start, stop in zip(masked["row"].to_pylist(), ends[:-1], ends[1:], strict=True)
    }


def _digests(ids: pa.ChunkedArray) -> list[bytes]:
    flat, ends = flat_lists(ids)
    each = itertools.pairwise(ends)
    return [hashlib.blake2b(flat[start:stop].tobytes(), digest_size=16).digest() for start, stop in each]


def distance(known: Histogram, new: Histogram) -> float | None:
    """The Kolmogorov-Smirnov distance of two distributions, 0 to 1, to within a bin; None where one has no tokens.

    A bin is a 128th of a power of two wide.
    """
    if not known.any() or not new.any():
        return None
    shares = [counts.cumsum() / counts.sum() for counts in (known, new)]
    return float(np.abs(shares[0] - shares[1]).max())
