"""The method in plain loops and one full sort: slow, short, and written without the package's own code."""

import math
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


def score(settings, token):
    """The scorers' formulas, for one token.

    token: statistic → Python float.
    """
    kind, never = settings["scorer"], float("-inf")
    base, reference = token["base"], token["reference"]
    if kind == "excess_loss":
        return base - reference
    if kind == "gated_excess_loss":
        surprise = reference
        if settings.get("gate_on") == "surprise":
            surprise -= token["reference_entropy"]
        if settings.get("gate_on") == "rank":
            surprise = token["reference_rank"]
        if surprise < settings.get("gate", 2.0):
            return base - reference
        return never if settings.get("strict") else -reference
    if kind == "plausibility":
        on = settings.get("gate_on")
        if on == "rank":
            return -token["reference_rank"]
        return -reference + (token["reference_entropy"] if on == "surprise" else 0)
    if kind == "base_loss":
        return base
    if kind == "probability":
        p = math.exp(-base)
        return p if settings.get("above", -1) < p < settings.get("below", 2) else never
    return token["base_entropy"] if kind == "entropy" else token["random"]
