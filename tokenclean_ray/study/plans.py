"""The plans that `tokenclean study` compares, as data."""

from dataclasses import dataclass
from functools import partial

from tokenclean_ray.config import Select

ROUNDS = 4

_paper = partial(Select, scorer="excess_loss")
_gate = partial(Select, scorer="gated_excess_loss")
_PAPER = _paper()


@dataclass(frozen=True)
class Plan:
    """A selection, and whether it is made once from the whole pool or round by round."""

    select: Select = _PAPER
    rounds: bool = False
    guarded: bool = False
    oracle: bool = False
    """Keep just what is no noise."""


_VARIANTS = {"": _PAPER, ", gate": _gate(), ", auto gate": _gate(gate="auto")}
_RATIOS = (0.4, 0.5, 0.7, 0.8, 0.9)
PLANS = {
    "full": Plan(Select(scorer="full", keep_ratio=1)),
    "random": Plan(Select(scorer="random")),
    **{f"rho{name}": Plan(select.model_copy(update={"scope": "sample"})) for name, select in _VARIANTS.items()},
    **{f"fixed{name}": Plan(select) for name, select in _VARIANTS.items()},
    **{f"self-evolving{name}": Plan(select, rounds=True) for name, select in _VARIANTS.items()},
    **{f"self-evolving, guarded{name}": Plan(select, rounds=True, guarded=True) for name, select in _VARIANTS.items()},
    "fixed, plausibility": Plan(Select(scorer="plausibility")),
    "fixed, strict gate": Plan(_gate(strict=True)),
    **{f"fixed, gate {gate:g}": Plan(_gate(gate=gate)) for gate in (1, 4)},
    **{f"fixed, auto gate {q:g}": Plan(_gate(gate="auto", gate_quantile=q)) for q in (0.9, 0.99)},
    "fixed, gate on surprise": Plan(_gate(gate_on="surprise")),
    **{f"fixed, gate on rank {rank}": Plan(_gate(gate_on="rank", gate=rank)) for rank in (5, 20)},
    **{f"fixed, ratio {ratio:g}": Plan(_paper(keep_ratio=ratio)) for ratio in _RATIOS},
    **{f"fixed, gate, ratio {ratio:g}": Plan(_gate(keep_ratio=ratio)) for ratio in _RATIOS},
    "fixed, auto ratio": Plan(_paper(keep_ratio="auto")),
    "fixed, gate, auto ratio": Plan(_gate(keep_ratio="auto")),
    "oracle": Plan(oracle=True),
}
CORE_PLANS = (
    *("full", "random"),
    *(f"{plan}{name}" for plan in ("rho", "fixed", "self-evolving", "self-evolving, guarded") for name in _VARIANTS),
    *("fixed, plausibility", "fixed, strict gate", "oracle"),
)
SWEEP_PLANS = ("full", *(f"{plan}{name}" for plan in ("fixed", "self-evolving") for name in _VARIANTS), "oracle")
WIDE_PLANS = ("full", *(name for name in PLANS if name.startswith("fixed") and "auto ratio" not in name), "oracle")
AUTO_PLANS = ("full", "fixed", "fixed, gate", "fixed, auto ratio", "fixed, gate, auto ratio", "oracle")
