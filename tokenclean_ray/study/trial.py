"""One trial of `tokenclean study`: a task, and every plan of cleaning over it. Needs no Ray.

Input: a `Task`. Output: per plan what was kept and what the model that was trained on it is worth. Scores, cuts and
training are those of the package: `score`, `selection`, `finetune`.
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tokenclean_ray import calibrate, scorers, selection
from tokenclean_ray.config import Calibrate, Select, Train
from tokenclean_ray.finetune import fit
from tokenclean_ray.held_out import REFUSALS, held_out_statistics, row_sums
from tokenclean_ray.plant import KINDS, plant
from tokenclean_ray.planted import Texts
from tokenclean_ray.score import score_statistics
from tokenclean_ray.study.plans import ROUNDS, Plan
from tokenclean_ray.token_loss import TokenLoss

PART = "part-0000000000000000"
KNOWN = ("loss", "entropy", "rank")
COPIED = 0.1  # of a pool that is small
LEAST_RATIO = 0.01  # where a run would end, because no ratio keeps the noise within the limit


@dataclass(frozen=True)
class Recipes:
    """How a task's models are trained."""

    pool: Train
    round: Train


@dataclass(frozen=True)
class Task:
    """One seed of one setting."""

    base: TokenLoss
    reference: TokenLoss
    """The base after the warm-up set."""
    pool: Texts
    guard: Texts
    """Clean rows, like the warm-up set's."""
    tests: dict[str, Texts]
    """Clean rows: loss, and facts_loss where there are facts."""
    recipes: Recipes


def trained(model: TokenLoss, texts: Texts, keep: np.ndarray, settings: Train, seed: int) -> TokenLoss:
    """A copy of a model, trained on the kept tokens, (N,)."""
    model = copy.deepcopy(model)
    fit(model, texts.rows(keep), settings, seed)
    return model


def statistics(model: TokenLoss, texts: Texts) -> dict[str, np.ndarray]:
    """Loss and entropy (nats) and rank of the response tokens, (N,) each, 0 elsewhere."""
    found = score_statistics(model, texts.ids, texts.response, texts.offsets, 4096, KNOWN[1:])
    return dict(zip(KNOWN, found, strict=True))


Known = dict[str, np.ndarray]


def of_tokens(texts: Texts, base: Known, reference: Known) -> scorers.Statistics:
    """What `selection` scores the response tokens by."""
    known = {"base": base["loss"], "reference": reference["loss"]}
    known |= {"base_entropy": base["entropy"], "reference_entropy": reference["entropy"]}
    known |= {"reference_rank": reference["rank"]}
    return {name: values[texts.response] for name, values in known.items()}


def select_tokens(texts: Texts, known: scorers.Statistics, select: Select) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the response tokens, and which tokens are kept, (N,), by the scorers and cuts of `selection`."""
    at = np.flatnonzero(texts.response)
    row = texts.row[at]
    mixes = selection.mix(PART, row, at - texts.offsets[row])
    score = scorers.SCORERS[select.scorer].score(known | {"random": selection.uniform(mixes, select.seed)}, select)
    key = selection.order_key(score)
    keep = np.zeros(len(texts.ids), bool)
    among = row if select.scope == "sample" else np.zeros_like(row)  # all tokens together are as those of one row
    keep[at] = selection.keep_per_row(key, mixes, among, select.ratio)
    return score, keep


def with_gate(select: Select, clean: Known, response: np.ndarray) -> Select:
    """gate: auto made a number: what its share of the clean tokens stays within."""
    if select.gate != "auto":
        return select
    known = {"reference": clean["loss"], "reference_entropy": clean["entropy"], "reference_rank": clean["rank"]}
    values = np.sort(scorers.implausibility({name: v[response] for name, v in known.items()}, select))
    last = values[selection.keep_count(select.gate_quantile, len(values)) - 1]
    return select.model_copy(update={"gate": scorers.gate_up_to(last)})


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive outranks a negative, ties half (Mann and Whitney 1947): exact, of each score by itself."""
    values, place = np.unique(score, return_inverse=True)
    return calibrate.auroc(*(np.bincount(place[of], minlength=len(values)) for of in (~positive, positive)))


class Trial:
    """A task, and every plan over it."""

    def __init__(self, task: Task, keep_ratio: float, seed: int) -> None:
        """`keep_ratio`: of the plans that name none."""
        self.task, self.seed, self._keep_ratio = task, seed, keep_ratio
        self.base_known = statistics(task.base, task.pool)
        self.reference_known = statistics(task.reference, task.pool)
        self.guard_known = statistics(task.reference, task.guard)
        self._made: dict[Any, tuple[TokenLoss, dict[str, Any]]] = {}

    def run(self, plan: Plan) -> dict[str, Any]:
        """What a plan comes to."""
        if plan.rounds:
            return self._evolve(plan)
        task = self.task
        score, settled = None, {}
        keep = task.pool.response & ~task.pool.noise
        if not plan.oracle:
            select = with_gate(self._select(plan), self.guard_known, task.guard.response)
            settled = {"gate": select.gate} if plan.select.gate == "auto" else {}
            if select.keep_ratio == "auto":
                select, estimates = self._with_ratio(select)
                settled |= estimates
            score, keep = select_tokens(task.pool, of_tokens(task.pool, self.base_known, self.reference_known), select)
        _, found = self._train("base", task.base, task.pool, keep, task.recipes.pool, self.seed)
        return self.describe(task.pool, score, keep) | settled | found

    @cached_property
    def _planted(self) -> tuple[scorers.Statistics, np.ndarray]:
        """Planted tokens in copies of some rows: what is known of each, and the fold of its row."""
        task, planting = self.task, Calibrate(share=COPIED)
        random = np.random.default_rng([self.seed, 2])
        rows = np.flatnonzero(random.random(len(task.pool.offsets) - 1) < planting.share)
        texts = task.pool.take(rows)
        shares = {kind: planting.replaced / len(KINDS) for kind in KINDS}
        may, vocabulary = texts.response, np.arange(task.base.model.config.vocab_size)
        ids, kinds = plant(texts.ids, may, may, texts.offsets, shares, vocabulary, random)
        copies = replace(texts, ids=ids)
        known = of_tokens(copies, statistics(task.base, copies), statistics(task.reference, copies))
        planted = kinds[may] > 0
        folds = (copies.row % calibrate.FOLDS)[may]
        return {name: values[planted] for name, values in known.items()}, folds[planted]

    def _with_ratio(self, select: Select) -> tuple[Select, dict[str, float]]:
        """keep_ratio: auto made a number by planted copies of some rows, as `settle` does."""
        pool = of_tokens(self.task.pool, self.base_known, self.reference_known)
        planted, fold = self._planted
        scores = {}
        for by in (select, Select(scorer="plausibility")):
            score = scorers.SCORERS[by.scorer].score
            keys = [selection.order_key(score(known, by)) for known in (pool, planted)]
            folds = [selection.first_digits(keys[1][fold == number]) for number in range(calibrate.FOLDS)]
            scores[by.scorer] = calibrate.Scores(selection.first_digits(keys[0]), np.array(folds), np.zeros_like(folds))
        share = calibrate.pool_noise(scores.values())
        ratio = calibrate.largest_ratio(scores[select.scorer], share, select.max_noise) or LEAST_RATIO
        truth = float(self.task.pool.noise.sum() / self.task.pool.response.sum())
        estimates = {"ratio": ratio, "noise_share": share, "true_noise_share": truth}
        return select.model_copy(update={"keep_ratio": ratio}), estimates

    def _select(self, plan: Plan) -> Select:
        own = plan.select.model_fields_set
        return plan.select if "keep_ratio" in own else plan.select.model_copy(update={"keep_ratio": self._keep_ratio})

    def _train(
        self, path: Any, start: TokenLoss, texts: Texts, keep: np.ndarray, recipe: Train, seed: int
    ) -> tuple[TokenLoss, dict[str, Any]]:
        """A model and its measure; plans that came the same way to the same tokens share it."""
        key = (path, keep.tobytes())
        if key not in self._made:
            model = trained(start, texts, keep, recipe, seed)
            self._made[key] = model, self.measure(model)
        return self._made[key]

    def measure(self, model: TokenLoss) -> dict[str, float]:
        """On clean rows: nats per answer token; shares of answer tokens, and of rows, that are right throughout."""
        found = {}
        for name, texts in self.task.tests.items():
            known = statistics(model, texts)
            found[name] = float(known["loss"][texts.answer].mean(dtype=np.float64))
            if name == "loss":
                right = known["rank"][texts.answer] == 0  # a right prefix is given
                wrong_rows = len(np.unique(texts.row[texts.answer][~right]))
                found["accuracy"] = float(right.mean())
                found["exact_match"] = 1 - wrong_rows / (len(texts.offsets) - 1)
        return found

    def describe(self, texts: Texts, score: np.ndarray | None, keep: np.ndarray) -> dict[str, float]:
        """What a selection is made of: shares, and the AUROC of its score for clean against noise."""
        found = {"kept": float(keep.sum() / texts.response.sum())}
        if keep.any():
            found["noise_kept"] = float(texts.noise[keep].mean())
        if score is not None:
            found["auroc"] = auroc(score, ~texts.noise[texts.response])
        if texts.fact.any():
            found["facts_kept"] = float(keep[texts.fact & texts.answer & ~texts.noise].mean())
        return found

    def _evolve(self, plan: Plan) -> dict[str, Any]:
        """Algorithm 1 of arXiv 2502.01968 from the warm-up reference on, as `rounds` runs it.

        Guarded, a round that is worse than the best so far on clean held-out rows does not become the reference.
        """
        task = self.task
        path: tuple[Any, ...] = ("reference",)
        newest, clean = task.reference, self.guard_known
        best = clean["loss"]
        refused, rounds, accepted = 0, [], 0
        outcome: dict[str, Any] = self.measure(newest)
        parts = np.array_split(np.arange(len(task.pool.offsets) - 1), ROUNDS)
        for number, rows in enumerate(parts):
            texts = task.pool.take(rows)
            mine = slice(task.pool.offsets[rows[0]], task.pool.offsets[rows[-1] + 1])
            select = with_gate(self._select(plan), clean, task.guard.response)
            base = {name: values[mine] for name, values in self.base_known.items()}
            score, keep = select_tokens(texts, of_tokens(texts, base, statistics(newest, texts)), select)
            way = (*path, number)
            model, found = self._train(way, newest, texts, keep, task.recipes.round, self.seed + 1 + number)
            held = statistics(model, task.guard)
            sums = row_sums(task.guard.response, held["loss"], best, task.guard.offsets)
            verdict = held_out_statistics(sums)
            found = self.describe(texts, score, keep) | found
            rounds.append(found | {"accepted": verdict.no_worse or not plan.guarded})
            if plan.guarded and not verdict.no_worse:
                refused += 1
                if refused == REFUSALS:
                    break
                continue
            newest, clean, path, outcome, refused = model, held, (*way, keep.tobytes()), found, 0
            accepted += 1
            best = held["loss"] if verdict.difference < 0 else best
        return outcome | {"accepted": accepted, "rounds": rounds}
