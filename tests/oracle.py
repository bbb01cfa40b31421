"""The method in plain loops and one full sort: slow, short, and written without the package's own code."""

import math
from fractions import Fraction

import numpy as np
import torch
from transformers import AutoModelForCausalLM


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


def agree_but_for_rounding(found, rows, column, model):
    """Losses of response tokens within 1e-4 nats of those of the reference scripts; returns the largest difference.

    In long rows float32 leaves the losses of the weak of the given models undetermined by up to 6e-4 nats (it was
    trained on 256 tokens): 65 of the reference scripts' 43,966 lie more than 1e-4 from float64's. So no more of ours
    may lie that far from the reference scripts' than of theirs from the exact value, which may be none.

    found: a list for each row. rows: of the reference scripts. column: their losses. model: a folder.
    """
    masks = [np.array(row["response_mask"]) for row in rows]
    theirs = np.concatenate([np.array(row[column])[mask] for row, mask in zip(rows, masks, strict=True)])
    ours = np.concatenate([np.array(losses)[mask] for losses, mask in zip(found, masks, strict=True)])
    distances = np.abs(ours - theirs)
    if distances.max() < 1e-4:
        return distances.max()
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    truth = []
    for row, mask in zip(rows, masks, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = exact(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        truth.append(-log_probs.gather(-1, ids[0, 1:, None])[:, 0].numpy()[mask[1:]])
    noise = np.abs(theirs - np.concatenate(truth))
    told = f"worst {distances.max():.2e}, {(distances > 1e-4).sum()} beyond 1e-4; theirs {noise.max():.2e}"
    assert (distances > 1e-4).sum() <= (noise > 1e-4).sum(), told
    assert distances.max() < max(1e-4, 1.5 * noise.max()), told
    return distances.max()
