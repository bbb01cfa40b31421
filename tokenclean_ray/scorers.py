"""What a token is worth: scores from what is known of it, its losses above all. Pure numpy.

Input: statistics of tokens. Output: a score for each; the highest are kept, see `selection`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenclean_ray.config import Select

Statistics = dict[str, np.ndarray]
"""What is known of N tokens, float32, (N,) each: base and reference are losses in nats; base_entropy and
reference_entropy, in nats, and reference_rank, from 0, are of the predictive distributions; random is uniform in
[0, 1)."""


@dataclass(frozen=True)
class Scorer:
    """A score of tokens, from what is known of each: higher is kept first, −inf never."""

    score: Callable[[Statistics, Select], np.ndarray]
    """(N,) float32."""
    needs: tuple[str, ...]
    """The statistics that it reads."""


def excess_loss(token: Statistics, select: Select) -> np.ndarray:
    """l_base − l_ref: how much the reference improves on the base (arXiv 2502.01968, section 3)."""
    return token["base"] - token["reference"]


def gated_excess_loss(token: Statistics, select: Select) -> np.ndarray:
    """[l_ref < gate] · l_base − l_ref: a gain counts only where the reference itself finds the token plausible.

    With the gate on the loss, every token inside ranks above every one outside (≥ −l_ref > −gate ≥ the rest), and
    those outside rank by their plausibility. Derived here: an excess loss is largest where the base is confident and
    a drifting reference merely less surprised, which is what noise looks like.
    """
    plausible = implausibility(token, select) < np.float32(select.gate)
    outside = np.float32(-np.inf) if select.strict else -token["reference"]
    return np.where(plausible, token["base"] - token["reference"], outside)


def implausibility(token: Statistics, select: Select) -> np.ndarray:
    """How unlikely the reference finds a token: what the gate is on.

    Returns:
        its loss in nats; or its surprise, the loss minus the entropy of the prediction (low also where everything is
        unlikely); or its rank, how many tokens are likelier.
    """
    if select.gate_on == "rank":
        return token["reference_rank"]
    return token["reference"] - token["reference_entropy"] if select.gate_on == "surprise" else token["reference"]


def gate_up_to(value: float) -> float:
    """The gate that lets pass what is at most `value`: the gate itself is outside."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def plausibility(token: Statistics, select: Select) -> np.ndarray:
    """−l_ref (or −surprise, −rank): what the reference finds likeliest, whether it learned it or the base knew it.

    The gated score with a gate that fewer tokens pass than are kept selects the same tokens.
    """
    return -implausibility(token, select)


def base_loss(token: Statistics, select: Select) -> np.ndarray:
    """l_base: what the base finds hardest (ESLM, arXiv 2505.19893)."""
    return token["base"]


def probability(token: Statistics, select: Select) -> np.ndarray:
    """P_base = exp(−l_base) within (above, below), never kept outside.

    With keep_ratio 1 the thresholds alone decide: above 0.4 is STM (arXiv 2501.14315), above 0.1 ProFit (2601.09195)
    frozen at the base, below 0.95 the novelty part of XTF (2602.14536).
    """
    share = np.exp(-token["base"])
    inside = np.ones(len(share), bool)
    if select.above is not None:
        inside &= share > np.float32(select.above)
    if select.below is not None:
        inside &= share < np.float32(select.below)
    return np.where(inside, share, np.float32(-np.inf))


def entropy(token: Statistics, select: Select) -> np.ndarray:
    """Entropy of the base's prediction: where it is least certain (ESLM, arXiv 2505.19893)."""
    return token["base_entropy"]


def random_score(token: Statistics, select: Select) -> np.ndarray:
    """The same share at random: what any scorer has to beat."""
    return token["random"]


SCORERS = {
    "excess_loss": Scorer(excess_loss, ("base", "reference")),
    "gated_excess_loss": Scorer(gated_excess_loss, ("base", "reference")),
    "plausibility": Scorer(plausibility, ("reference",)),
    "base_loss": Scorer(base_loss, ("base",)),
    "probability": Scorer(probability, ("base",)),
    "entropy": Scorer(entropy, ("base_entropy",)),
    "random": Scorer(random_score, ("random",)),
    "full": Scorer(random_score, ("random",)),  # config holds its keep_ratio at 1, so that any score does
}


def statistics(select: Select) -> tuple[str, ...]:
    """What has to be known of a token to score it."""
    gated = select.scorer in ("gated_excess_loss", "plausibility")
    more = {"surprise": ("reference_entropy",), "rank": ("reference_rank",)}.get(select.gate_on if gated else "", ())
    return (*SCORERS[select.scorer].needs, *more)


def models(select: Select) -> set[str]:
    """base, reference, both or neither: whose forward passes the scorer wants."""
    return {name.partition("_")[0] for name in statistics(select)} & {"base", "reference"}


def beside_losses(select: Select, role: str) -> tuple[str, ...]:
    """What has to be computed along with the losses of base or reference, of `schema.STATISTICS`."""
    of_role = (name.partition("_")[2] for name in statistics(select) if name.startswith(f"{role}_"))
    return tuple(sorted(of_role))
