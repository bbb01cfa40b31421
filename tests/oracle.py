"""The method in plain loops and one full sort: slow, short, and written without the package's own code."""

from fractions import Fraction


def splitmix(x):
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def place(part, row, position):
    return splitmix(splitmix((row << 32) | position) ^ int(part.removeprefix("part-"), 16))


def kept_tokens(tokens, keep_ratio, scope="global"):
    """The kept identities.

    tokens: dict (part, row, position) → score, a Python float.
    """
    ratio = Fraction(str(keep_ratio))
    groups = {}
    for identity in tokens:
        groups.setdefault(identity[:2] if scope == "sample" else (), []).append(identity)
    kept = set()
    for members in groups.values():
        ordered = sorted(members, key=lambda i: (tokens[i], place(*i)), reverse=True)
        kept.update(i for i in ordered[: int(ratio * len(members))] if tokens[i] != float("-inf"))
    return kept
