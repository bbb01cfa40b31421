"""The rounds of `evolve`: which there are, and one turn of the loop.

Input: a config and, for each turn, the parts of the pool that are its subsets. Output: an outcome a turn, for
metrics.jsonl, and one line a plan for comparison.json. Fixed-model, self-evolving and the baselines are plans of the
one loop (arXiv 2502.01968, Algorithm 1).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tokenclean_ray import pipeline, settle
from tokenclean_ray.config import Config, Select
from tokenclean_ray.errors import UserError
from tokenclean_ray.held_out import REFUSALS, HeldOut
from tokenclean_ray.layout import Damaged
from tokenclean_ray.masking import EVERYTHING, Selection, find_selection, train_on
from tokenclean_ray.models import ModelSpec
from tokenclean_ray.progress import say
from tokenclean_ray.run import Run, Summaries, judge, losses_of


@dataclass(frozen=True)
class Round:
    """One turn of the loop: select on some subsets by a reference, train from a start."""

    plan: str
    number: int
    """From 1, within the plan."""
    subsets: tuple[int, ...]
    select: Select
    reference: Literal["none", "first", "newest"]
    start: Literal["base", "newest"]


def plan_rounds(config: Config) -> list[Round]:
    """The rounds of all plans. With a warm-up set or a reference every subset is pool, else subset 0 is the warm-up."""
    first = 0 if config.data.warmup or config.model.reference else 1
    subsets = tuple(range(first, config.evolve.num_subsets))
    if not subsets:
        raise UserError("evolve.num_subsets: without data.warmup subset 0 is the warm-up, so at least 2 are needed")
    select = config.select
    if select.keep_ratio == "auto" and (needs := {"random", "rho"} & set(config.evolve.plans)):
        raise UserError(f"select.keep_ratio: auto is not for the plan {min(needs)}: give a number, or leave it out")
    rounds = []
    for plan in config.evolve.plans:
        match plan:
            case "full":
                rounds.append(Round(plan, 1, subsets, EVERYTHING, "none", "base"))
            case "random":
                share = Select(scorer="random", seed=config.seed, keep_ratio=select.keep_ratio)
                rounds.append(Round(plan, 1, subsets, share, "none", "base"))
            case "rho":
                per_row = select.model_copy(update={"scope": "sample"})
                rounds.append(Round(plan, 1, subsets, per_row, "first", "base"))
            case "fixed":
                rounds.append(Round(plan, 1, subsets, select, "first", "base"))
            case "self_evolving":
                rounds += [Round(plan, t, (subset,), select, "newest", "newest") for t, subset in enumerate(subsets, 1)]
    return rounds


class Loop:
    """What passes from round to round."""

    def __init__(self, run: Run, held_out: Summaries, reference: ModelSpec) -> None:
        self.run, self.held_out, self.reference = run, held_out, reference
        self.selections: dict[str, Selection] = {}
        self.comparison: list[dict[str, Any]] = []
        self._plan = ""

    def turn(self, round: Round, parts: Summaries) -> dict[str, Any] | None:
        """One round; None where the plan has ended early."""
        run = self.run
        if round.plan != self._plan:
            self._plan, self.newest, self._best, self._refused = round.plan, self.reference, self.reference, 0
        if self._refused == REFUSALS:
            say(f"{round.plan} round {round.number} is left out: {REFUSALS} rounds in a row were refused")
            return None
        say(f"-- {round.plan} round {round.number}, subsets {', '.join(map(str, round.subsets))}")
        reference = {"none": None, "first": self.reference, "newest": self.newest}[round.reference]
        models = {"base": run.base} | ({"reference": reference} if reference else {})
        losses, select, calibration = settle.score_and_settle(run, round.select, models, parts, self.held_out)
        chosen = find_selection(run, parts, losses, select, calibration)
        start = run.base if round.start == "base" else self.newest
        model, manifest = train_on(run, f"{round.plan}-{round.number}", start, chosen)
        self.selections[chosen.name] = chosen
        outcome: dict[str, Any] = {
            "plan": round.plan,
            "round": round.number,
            "selection": chosen.name,
            "model": model.path,
            "reference": reference and reference.path,
            "threshold": chosen.threshold.get("score"),
            "kept_share": chosen.threshold["kept"] / chosen.threshold["tokens"],
            "tokens_trained": manifest["tokens"],
            "seconds": manifest["seconds"],
            "tokens_per_s": manifest["tokens"] / max(manifest["seconds"], 1e-9),
            "training_curve": manifest["loss"],
            "accepted": True,
        }
        if self.held_out:
            held = judge(run, self.held_out, model, self._best)
            outcome["held_out"] = asdict(held)
            outcome["accepted"] = self._accept(round, held)
            outcome["agreement"] = self._agreement(model, chosen.select, round)
        if outcome["accepted"]:
            self._refused = 0
            self.newest = model
            if self.held_out and held.difference < 0:
                self._best = model
        self._compare(outcome)
        return outcome

    def _accept(self, round: Round, held: HeldOut) -> bool:
        """Whether a round may become the reference."""
        say(f"   held-out loss {held.loss:.4f} ± {held.standard_error:.4f} nats")
        guarded = self.run.config.evolve.guard and round.plan == "self_evolving"
        if not guarded or held.no_worse:
            return True
        self._refused += 1
        say(
            f"   refused: worse than the best accepted model by {held.difference:.4f} ± {held.difference_error:.4f} "
            "nats; the reference stays"
        )
        return False

    def _agreement(self, model: ModelSpec, select: Select, round: Round) -> float | None:
        """Share of held-out tokens on whose mask model and reference of a round agree; None where one keeps none."""
        run = self.run
        if round.plan != "self_evolving":
            return None
        select = select.model_copy(update={"scope": "global"})
        sides = []
        for reference in (model, self.newest):
            losses = losses_of(run, select, {"base": run.base, "reference": reference})
            try:
                chosen = find_selection(run, self.held_out, losses, select)
            except Damaged:
                raise
            except UserError:  # a ruined model, which rules out every token or gives NaN: the guard refuses it
                return None
            assert chosen.cuts is not None
            sides.append((chosen.losses, chosen.cuts))
        agreeing = pipeline.count_agreeing(run.store, chosen.parts, sides[0], sides[1], select)
        return agreeing / chosen.threshold["tokens"]

    def _compare(self, outcome: dict[str, Any]) -> None:
        """One line a plan: its last accepted model, or what it began with; all its rounds' tokens and seconds."""
        held = outcome.get("held_out", {})
        judged = ("loss", "standard_error") if outcome["accepted"] else ("best_loss", "best_error")
        row = {
            "plan": outcome["plan"],
            "rounds": 1,
            "accepted": int(outcome["accepted"]),
            "held_out_loss": held.get(judged[0]),
            "standard_error": held.get(judged[1]),
            "kept_share": outcome["kept_share"],
            "tokens_trained": outcome["tokens_trained"],
            "seconds": outcome["seconds"],
        }
        if self.comparison and self.comparison[-1]["plan"] == outcome["plan"]:
            before = self.comparison.pop()
            for key in ("rounds", "accepted", "tokens_trained", "seconds"):
                row[key] += before[key]
            if not outcome["accepted"]:
                row |= {key: before[key] for key in ("held_out_loss", "standard_error", "kept_share")}
        self.comparison.append(row)
