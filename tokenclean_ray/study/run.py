"""`tokenclean study`: every plan of cleaning on tasks whose noise is known because it was planted. Needs no Ray.

Input: seeds, settings and a folder. Output: in it trials.jsonl, a line a trial, and study.md and study.png, the mean
and spread of each plan's results over seeds. The task is made up (`planted`) or real text (`real_text`): a base, a
reference that was trained on a small clean warm-up set, and a pool with noise.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenclean_ray import __version__
from tokenclean_ray.config import Train
from tokenclean_ray.errors import UserError
from tokenclean_ray.planted import VOCABULARY, Noise, World
from tokenclean_ray.progress import say
from tokenclean_ray.study import real_text, report
from tokenclean_ray.study.plans import AUTO_PLANS, CORE_PLANS, PLANS, SWEEP_PLANS, WIDE_PLANS
from tokenclean_ray.study.trial import Recipes, Task, Trial, trained
from tokenclean_ray.token_loss import TokenLoss

TRIALS = "trials.jsonl"
# rounding alone moves a seed's losses as far as another seed does, so trials of several are not mixed
VERSIONS = {"torch": torch.__version__, "tokenclean": __version__}


@dataclass(frozen=True)
class Setting:
    """What one trial is made of."""

    noise: float = 0.3
    """Share of the pool's response tokens that are replaced; of evasions and wrong_answers: of its rows."""
    kind: Noise = "random"
    facts: float = 0.0
    """Share of the pool's rows that ask for facts; the warm-up set and the guard's rows never do."""
    warmup_noise: float = 0.0
    keep_ratio: float = 0.6
    """Of the plans that name none."""
    pretrain_rows: int = 16000
    warmup_rows: int = 700
    pool_rows: int = 4800
    test_rows: int = 1000
    plans: tuple[str, ...] = CORE_PLANS
    text: real_text.Text | None = None
    """Real text instead of the made-up task."""


CORE = {"rule": Setting(), "facts": Setting(facts=0.4)}
SWEEP = {
    **{f"noise {share:g}": Setting(noise=share, plans=SWEEP_PLANS) for share in (0.05, 0.15, 0.45)},
    "other rows": Setting(kind="other_rows", plans=SWEEP_PLANS),
    "evasions": Setting(kind="evasions", plans=SWEEP_PLANS),
    "wrong answers": Setting(kind="wrong_answers", plans=SWEEP_PLANS),
    "noisy warm-up": Setting(warmup_noise=0.3, plans=SWEEP_PLANS),
    "short warm-up": Setting(warmup_rows=200, plans=SWEEP_PLANS),
    **{
        f"facts, auto ratio, noise {share:g}": Setting(noise=share, facts=0.4, plans=AUTO_PLANS)
        for share in (0.1, 0.3, 0.45)
    },
    "facts, gates and ratios": Setting(facts=0.4, plans=WIDE_PLANS),
    "facts, gates and ratios, noise 0.1": Setting(noise=0.1, facts=0.4, plans=WIDE_PLANS),
}


def text_settings(text: real_text.Text) -> dict[str, Setting]:
    """The study on real text."""
    plain = Setting(text=text, pretrain_rows=500, warmup_rows=300, pool_rows=500)
    return {"text": plain, "text, other rows": replace(plain, kind="other_rows", plans=SWEEP_PLANS)}


POOL = Train(method="full", learning_rate=3e-3, batch_rows=16, epochs=3)  # with half of the updates nothing is learnt
PRETRAIN = POOL.model_copy(update={"epochs": 1})
WARMUP = POOL.model_copy(update={"epochs": 5})
ROUND = POOL.model_copy(update={"learning_rate": 5e-4, "epochs": 2})


def new_model(seed: int) -> TokenLoss:
    """A Llama of 0.1 M parameters, untrained."""
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return TokenLoss(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **size)))


def made_up_task(setting: Setting, seed: int) -> Task:
    """Shift letters: the base, trained from scratch, knows the phrases; the warm-up set teaches the shift."""
    world = World(seed)
    pool = world.texts(setting.pool_rows, setting.noise, setting.kind, setting.facts)
    guard = world.texts(setting.warmup_rows // 4)
    tests = {"loss": world.texts(setting.test_rows)}
    if setting.facts:
        tests["facts_loss"] = world.texts(setting.test_rows, facts=1.0)
    loose = world.loose_texts(setting.pretrain_rows, setting.kind)
    warmup = world.texts(setting.warmup_rows, setting.warmup_noise)
    base = trained(new_model(seed), loose, np.ones(len(loose.ids), bool), PRETRAIN, seed)
    reference = trained(base, warmup, warmup.response, WARMUP, seed)
    return Task(base, reference, pool, guard, tests, Recipes(POOL, ROUND))


def text_task(setting: Setting, seed: int) -> Task:
    """Real text: the given model, trained on a part of it, is the base; the warm-up set makes it the reference."""
    text = setting.text
    assert text is not None
    start, rows = real_text.load(text, setting.pretrain_rows, setting.warmup_rows, setting.pool_rows, seed)
    base = trained(start, rows["pretrain"], rows["pretrain"].response, text.recipe(text.pretrain_epochs), seed)
    reference = trained(base, rows["warmup"], rows["warmup"].response, text.recipe(text.warmup_epochs), seed)
    pool = real_text.plant_noise(rows["pool"], start.model.config.vocab_size, setting.noise, setting.kind, seed)
    recipe = text.recipe(1)
    return Task(base, reference, pool, rows["guard"], {"loss": rows["test"]}, Recipes(recipe, recipe))


def run_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """Run every plan of a trial on one thread, so that results do not depend on how many trials run at a time.

    Returns:
        `seconds`, and `plans`: plan → its results.
    """
    torch.set_num_threads(1)
    began = time.monotonic()
    trial = Trial((text_task if setting.text else made_up_task)(setting, seed), setting.keep_ratio, seed)
    results = {"base": trial.measure(trial.task.base), "reference": trial.measure(trial.task.reference)}
    results |= {name: trial.run(PLANS[name]) for name in setting.plans}
    return {"seconds": round(time.monotonic() - began, 1), "plans": results}


def run(output: str, seeds: Iterable[int], settings: dict[str, Setting], workers: int | None = None) -> None:
    """Run every setting with every seed, side by side, and write the results; trials that are there are kept."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    found = _read_trials(folder / TRIALS)
    described = {name: _described(setting) for name, setting in settings.items()}
    identities = {(name, seed): _identity(described[name], seed, VERSIONS) for seed in seeds for name in settings}
    began = time.monotonic()
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        missing = [task for task, identity in identities.items() if identity not in found]
        waiting = {pool.submit(run_trial, settings[name], seed): (name, seed) for name, seed in missing}
        try:
            for future in as_completed(waiting):
                name, seed = waiting[future]
                trial = {"name": name, "setting": described[name], "seed": seed, "versions": VERSIONS}
                trial |= future.result()
                _append(folder / TRIALS, json.dumps(trial))
                found[identities[name, seed]] = trial
                say(f"{name}, seed {seed}: {trial['seconds']:.0f} s, done at {time.monotonic() - began:.0f} s")
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)  # else all that wait would be trained first, and lost
            for process in active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "the process of a trial died, probably for lack of memory; the same command goes on"
                ) from error
            raise
    print(report.write(folder, [found[identity] for identity in identities.values()], _described(Setting())))


def _described(setting: Setting) -> dict[str, Any]:
    return asdict(setting) | {"text": setting.text and real_text.describe_text(setting.text)}


def _identity(described: dict[str, Any], seed: int, versions: dict[str, str]) -> str:
    return json.dumps([described, seed, versions], sort_keys=True)


def _append(file: Path, line: str) -> None:
    """A line of its own, whatever a dying process left behind."""
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read() == b"\n" else f"\n{line}"
        stream.write(f"{line}\n".encode())


def _read_trials(file: Path) -> dict[str, dict[str, Any]]:
    """The trials that are there; a line that a dying process left half written is passed over."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            trial = json.loads(line)
            found[_identity(trial["setting"], trial["seed"], trial.get("versions", {}))] = trial
    return found
