"""`tokenclean study`: every plan of cleaning on tasks whose noise is known because it was planted. Needs no Ray.

Input: seeds and a folder. Output: in it a JSON file a trial, and study.md, the mean and spread of each plan's results
over seeds. The task: shift four letters by three, between two phrases. A small base, trained from scratch, knows the
phrases and where to look, not the shift; a small clean warm-up set teaches the reference the shift; in the pool a
share of the response tokens is replaced at random. In the setting `facts` a part of the pool asks for what neither
has seen.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenclean_ray import selection
from tokenclean_ray.config import Select, Train
from tokenclean_ray.finetune import fit
from tokenclean_ray.planted import ANSWER, VOCABULARY, Texts, World
from tokenclean_ray.progress import say
from tokenclean_ray.score import score_statistics
from tokenclean_ray.token_loss import TokenLoss

POOL = Train(method="full", learning_rate=3e-3, batch_rows=16, epochs=3)
PRETRAIN = POOL.model_copy(update={"epochs": 1})
WARMUP = POOL.model_copy(update={"epochs": 5})
ROUND = POOL.model_copy(update={"learning_rate": 5e-4, "epochs": 2})
ROUNDS = 4
REFUSALS = 2  # in a row end a guarded plan, as in `rounds`
PART = "part-0000000000000000"


@dataclass(frozen=True)
class Setting:
    """What one trial is made of."""

    noise: float = 0.3
    """Share of the pool's response tokens that are replaced, the last of a row apart."""
    facts: float = 0.0
    """Share of the pool's rows that ask for facts; the warm-up set and the guard's rows never do."""
    warmup_noise: float = 0.0
    keep_ratio: float = 0.6
    gate: float = 2.0
    """Nats."""
    pretrain_rows: int = 16000
    warmup_rows: int = 700
    pool_rows: int = 4800
    test_rows: int = 1000


CORE = {"rule": Setting(), "facts": Setting(facts=0.4)}
SWEEP = CORE | {
    **{f"noise {share:g}": Setting(noise=share) for share in (0.05, 0.15, 0.45)},
    "noisy warm-up": Setting(warmup_noise=0.3),
    "short warm-up": Setting(warmup_rows=200),
    **{f"facts, gate {gate:g}": Setting(facts=0.4, gate=gate) for gate in (1.0, 3.0, 5.0)},
    **{f"ratio {ratio:g}": Setting(keep_ratio=ratio) for ratio in (0.3, 0.7)},
}


def new_model(seed: int) -> TokenLoss:
    """A Llama of 0.1 M parameters, untrained."""
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return TokenLoss(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **size)))


def trained(model: TokenLoss, texts: Texts, keep: np.ndarray, settings: Train, seed: int) -> TokenLoss:
    """A copy of a model, trained on the kept tokens, (R, T)."""
    model = copy.deepcopy(model)
    fit(model, texts.rows(keep), settings, seed)
    return model


def statistics(model: TokenLoss, texts: Texts) -> np.ndarray:
    """Losses and entropies of the response tokens, (2, R, T) float32, nats."""
    flat = score_statistics(model, texts.ids.ravel(), texts.response.ravel(), texts.offsets, 4096, entropy=True)
    return flat.reshape(2, *texts.ids.shape)


def select_tokens(
    texts: Texts, base: np.ndarray, reference: np.ndarray, select: Select
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the N response tokens, and which tokens are kept, (R, T), by the scorers and cuts of `selection`.

    Args:
        base: `statistics` of the base.
        reference: those of the reference.
    """
    row, position = np.nonzero(texts.response)
    mixes = selection.mix(PART, row, position)
    known = {"base": base[0], "base_entropy": base[1], "reference": reference[0], "reference_entropy": reference[1]}
    known = {name: values[texts.response] for name, values in known.items()}
    known["random"] = selection.uniform(mixes, select.seed)
    score = selection.SCORERS[select.scorer].score(known, select)
    key = selection.order_key(score)

    def tie(of: np.ndarray) -> np.ndarray:
        return mixes[of]

    keep = np.zeros(texts.ids.shape, bool)
    if select.scope == "sample":
        keep[texts.response] = selection.keep_per_row(key, mixes, row, select.keep_ratio)
    else:
        k = selection.keep_count(select.keep_ratio, len(key))
        cut, _ = selection.find_cut(lambda prefix: selection.histogram(key, tie, prefix), k)
        keep[texts.response] = selection.keep_global(key, tie, cut)
    return score, keep


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive outranks a negative, ties half (Mann and Whitney 1947)."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    wins = rank[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / (positive.sum() * (~positive).sum()))


class Trial:
    """One seed of one setting: its texts, its base and reference, and every plan over them."""

    def __init__(self, setting: Setting, seed: int) -> None:
        world = World(seed)
        self.setting, self.seed = setting, seed
        self.pool = world.texts(setting.pool_rows, setting.noise, setting.facts)
        self.guard = world.texts(setting.warmup_rows // 4)
        self.tests = {"loss": world.texts(setting.test_rows), "facts_loss": world.texts(setting.test_rows, facts=1.0)}
        loose = world.loose_texts(setting.pretrain_rows)
        warmup = world.texts(setting.warmup_rows, setting.warmup_noise)
        self.base = trained(new_model(seed), loose, np.ones(loose.ids.shape, bool), PRETRAIN, seed)
        self.reference = trained(self.base, warmup, warmup.response, WARMUP, seed)
        self.base_known = statistics(self.base, self.pool)
        self.reference_known = statistics(self.reference, self.pool)
        self._rounds: dict[tuple[Any, ...], tuple[TokenLoss, dict[str, float]]] = {}

    def measure(self, model: TokenLoss) -> dict[str, float]:
        """Mean loss on clean answers, nats per token, and the share of rows whose answer is right throughout."""
        found = {}
        for name, texts in self.tests.items():
            if name == "loss" or self.setting.facts:
                found[name] = float(statistics(model, texts)[0][:, ANSWER].mean(dtype=np.float64))
        ids = torch.from_numpy(self.tests["loss"].ids)
        with torch.inference_mode():
            # the answer depends on the question alone, so a right prefix gives nothing away
            likeliest = model.model(input_ids=ids).logits[:, ANSWER.start - 1 : ANSWER.stop - 1].argmax(-1)
        return found | {"exact_match": float((likeliest == ids[:, ANSWER]).all(1).float().mean())}

    def describe(self, texts: Texts, score: np.ndarray | None, keep: np.ndarray) -> dict[str, float]:
        """What a selection is made of: shares, and the AUROC of its score for clean against noise."""
        found = {"kept": float(keep.sum() / texts.response.sum()), "noise_kept": float(texts.noise[keep].mean())}
        if score is not None:
            found["auroc"] = auroc(score, ~texts.noise[texts.response])
        if self.setting.facts:
            answers = (texts.fact[:, None] & ~texts.noise)[:, ANSWER]
            found["facts_kept"] = float(keep[:, ANSWER][answers].mean())
        return found

    def once(self, select: Select) -> dict[str, Any]:
        """Select from the whole pool and train the base on it."""
        score, keep = select_tokens(self.pool, self.base_known, self.reference_known, select)
        model = trained(self.base, self.pool, keep, POOL, self.seed)
        return self.describe(self.pool, score, keep) | self.measure(model)

    def oracle(self) -> dict[str, Any]:
        """Train the base on all that is no noise."""
        keep = self.pool.response & ~self.pool.noise
        model = trained(self.base, self.pool, keep, POOL, self.seed)
        return self.describe(self.pool, None, keep) | self.measure(model)

    def evolve(self, select: Select, guarded: bool) -> dict[str, Any]:
        """Algorithm 1 of arXiv 2502.01968 from the warm-up reference on, as `rounds` runs it.

        Guarded, a round that is worse than the best so far on clean held-out rows, by more than the standard error of
        the difference, does not become the reference.
        """
        newest, best = self.reference, statistics(self.reference, self.guard)[0]
        accepted: tuple[int, ...] = ()
        refused, rounds = 0, []
        outcome: dict[str, Any] = {}
        for number in range(ROUNDS):
            model, found = self._round(newest, (select, *accepted, number), number)
            losses = statistics(model, self.guard)[0]
            worse = (losses - best).sum(1)  # per row, paired
            good = worse.mean() <= worse.std(ddof=1) / len(worse) ** 0.5
            rounds.append(found | {"accepted": bool(good or not guarded)})
            if guarded and not good:
                refused += 1
                if refused == REFUSALS:
                    break
                continue
            newest, accepted, outcome, refused = model, (*accepted, number), found, 0
            best = losses if worse.mean() < 0 else best
        return (outcome or self.measure(self.reference)) | {"accepted": len(accepted), "rounds": rounds}

    def _round(self, newest: TokenLoss, path: tuple[Any, ...], number: int) -> tuple[TokenLoss, dict[str, float]]:
        """Select from a subset and train on it; plans that came the same way share it.

        Args:
            path: the selection and the rounds that led to `newest`, then this one.
        """
        if path not in self._rounds:
            size = self.setting.pool_rows // ROUNDS
            here = slice(number * size, (number + 1) * size)
            texts, select = self.pool[here], path[0]
            score, keep = select_tokens(texts, self.base_known[:, here], statistics(newest, texts), select)
            model = trained(newest, texts, keep, ROUND, self.seed + 1 + number)
            self._rounds[path] = model, self.describe(texts, score, keep) | self.measure(model)
        return self._rounds[path]


def plans(trial: Trial) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name → what runs it."""
    setting = trial.setting
    paper = Select(keep_ratio=setting.keep_ratio)
    gate = Select(keep_ratio=setting.keep_ratio, scorer="gated_excess_loss", gate=setting.gate)
    others = {
        "surprise": gate.model_copy(update={"gate_on": "surprise"}),
        "strict": gate.model_copy(update={"strict": True}),
    }
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "full": partial(trial.once, Select(scorer="full", keep_ratio=1)),
        "random": partial(trial.once, Select(scorer="random", keep_ratio=setting.keep_ratio)),
    }
    for name, select in {"": paper, ", gate": gate}.items():
        found[f"rho{name}"] = partial(trial.once, select.model_copy(update={"scope": "sample"}))
        found[f"fixed{name}"] = partial(trial.once, select)
        found[f"self-evolving{name}"] = partial(trial.evolve, select, guarded=False)
        found[f"self-evolving, guarded{name}"] = partial(trial.evolve, select, guarded=True)
    for name, select in others.items() if setting.facts else ():
        found[f"fixed, gate, {name}"] = partial(trial.once, select)
    return found | {"oracle": trial.oracle}


def run_trial(setting: Setting, seed: int) -> dict[str, dict[str, Any]]:
    """Plan → its results, on one thread, so that they do not depend on how many trials run at a time."""
    torch.set_num_threads(1)
    trial = Trial(setting, seed)
    base = {"base": trial.measure(trial.base), "reference": trial.measure(trial.reference)}
    return base | {name: run_plan() for name, run_plan in plans(trial).items()}


def run(output: str, seeds: Iterable[int], settings: dict[str, Setting], workers: int | None = None) -> None:
    """Run every setting with every seed, side by side, and write the results; those that are there are kept."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(name, seed) for seed in seeds for name in settings]
    pool = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn"))
    began = time.monotonic()
    with pool:
        waiting = {task: pool.submit(_trial_file, folder, task[0], settings[task[0]], task[1]) for task in tasks}
        results: dict[str, list[dict[str, Any]]] = {}
        for (name, seed), future in waiting.items():
            results.setdefault(name, []).append(future.result())
            say(f"{name}, seed {seed}: done at {time.monotonic() - began:.0f} s")
    table = "\n".join(markdown(name, settings[name], trials) for name, trials in results.items())
    (folder / "study.md").write_text(table, encoding="utf-8")
    print(table)


def _trial_file(folder: Path, name: str, setting: Setting, seed: int) -> dict[str, Any]:
    file = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["setting"] == asdict(setting):
            return record["plans"]
    began = time.monotonic()
    found = run_trial(setting, seed)
    record = {"setting": asdict(setting), "seed": seed, "seconds": time.monotonic() - began, "plans": found}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return found


COLUMNS = {
    "loss": "loss on clean answers, nats",
    "facts_loss": "loss on facts, nats",
    "exact_match": "exact match",
    "noise_kept": "noise among kept",
    "facts_kept": "facts kept",
    "auroc": "AUROC",
    "recovered": "of the gap full to oracle",
}


def markdown(name: str, setting: Setting, trials: list[dict[str, Any]]) -> str:
    """A table of the plans of one setting: mean ± standard deviation over seeds."""
    for trial in trials:
        full, best = trial["full"]["loss"], trial["oracle"]["loss"]
        for plan in trial:
            if plan != "base":
                trial[plan]["recovered"] = (full - trial[plan]["loss"]) / (full - best)
    columns = [key for key in COLUMNS if any(key in plan for plan in trials[0].values())]
    default = asdict(Setting())
    changed = {key: value for key, value in asdict(setting).items() if value != default[key]}
    lines = [
        f"### {name}: {', '.join(f'{key} {value}' for key, value in changed.items()) or 'the defaults'}\n",
        f"{len(trials)} seeds, mean ± standard deviation.\n",
        "| plan | " + " | ".join(COLUMNS[key] for key in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for plan in trials[0]:
        cells = [_cell([trial[plan][key] for trial in trials if key in trial[plan]], key) for key in columns]
        lines.append(f"| {plan} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], key: str) -> str:
    if not values:
        return ""
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    if key in ("loss", "facts_loss", "auroc"):
        return f"{np.mean(values):.3f} ± {spread:.3f}"
    return f"{100 * np.mean(values):.1f} ± {100 * spread:.1f} %"
