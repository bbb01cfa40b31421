"""The losses of parts on Ray Data: actors that hold the models and how many of them, or the driver for little work.

What an actor does with a part: `score`, `vllm_score`.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.data import ActorPoolStrategy

from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.imports import KERNELS
from tokenclean_ray.layout import Store
from tokenclean_ray.memory import process_memory
from tokenclean_ray.progress import say
from tokenclean_ray.workers import Batch, Result, each, map_batches, results

if TYPE_CHECKING:  # it imports torch
    from tokenclean_ray.models import ModelSpec

# of one actor: Ray would restart one for ever that is killed for memory each time it loads
ACTOR_RESTARTS = 10
# bytes of weights × tokens: up to here the driver alone took 5 to 22 s, by the length of rows, and two actors, which
# must start first, 20 to 26
LITTLE_WORK = 3e11
LEAST_BYTES = 1 << 17  # that a model counts as, since its tokens cost more than the products of its matrices
FEW_BYTES = 1 << 28  # of all models: the driver's machine may have less memory than those of actors


class ScoringActor:
    """A `PartScorer`, or its like for vLLM, as Ray Data calls it; the driver does so where there is little work."""

    def __init__(self, **arguments: Any) -> None:
        """`arguments`: those of `PartScorer`."""
        from transformers.utils import logging as transformers_logging

        scorer: Callable[..., Any]
        if arguments["score"].backend == "vllm":
            from tokenclean_ray.vllm_score import VllmPartScorer as scorer
        else:
            from tokenclean_ray.score import PartScorer as scorer

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._store: Store = arguments["store"]
        self._folders = [folder for _, folder in arguments["models"]]
        self._error: UserError | None = None
        began = time.monotonic()
        try:
            self._scorer = scorer(**arguments)
            self._loaded: float | None = time.monotonic() - began
        except UserError as error:
            self._error = error  # Ray would report an actor that failed to start, without the cause

    def __call__(self, batch: Batch) -> Batch:
        """Score the parts of a batch."""
        return each(self._score)(batch)

    def _score(self, item: Result) -> list[Result]:
        if self._error:
            raise self._error
        part = item["part"]
        # the others are of a model that was there before, or of an attempt that died later
        missing = [folder for folder in self._folders if not self._store.has_part(folder, part)]
        began = time.monotonic()
        found = self._scorer.score(part, missing)
        loaded, self._loaded = self._loaded, None
        return [item | found | {"seconds": time.monotonic() - began, "memory": process_memory(), "loaded": loaded}]


def score_parts(
    store: Store, models: list[tuple["ModelSpec", str]], tokens: dict[str, int], score: Score, dtype: str, gpu: bool
) -> Iterator[Result]:
    """Losses of parts under one pool of actors that hold all the given models, or in the driver alone.

    Args:
        models: each with the folder of its losses.
        tokens: part → number of tokens, for the parts that some of the folders lack.

    Yields:
        per part `rows`, `tokens`, and `full_logits` and `lowered`, see `PartScorer.score`; `seconds` that its actor
        was at it, `memory`, the most bytes that the actor had so far, and `loaded`, the seconds that it took to load
        the models, once.
    """
    items: list[Result] = [{"part": part, "tokens": count} for part, count in tokens.items()]
    arguments = {"store": store, "models": models, "dtype": dtype, "score": score, "gpu": gpu}
    low, high = pool_size(score, gpu, len(items), sum({s.path: s.bytes for s, _ in models}.values()))
    if not gpu and is_little_work(score, [spec.bytes for spec, _ in models], sum(tokens.values())):
        yield from _score_here(items, arguments)
        return
    resources = {"num_gpus": score.gpus_per_actor, "num_cpus": 1} if gpu else {"num_cpus": score.cpus_per_actor}
    pool = ActorPoolStrategy(size=low) if low == high else ActorPoolStrategy(min_size=low, max_size=high)
    yield from results(
        map_batches(
            items,
            ScoringActor,
            here=0,
            fn_constructor_kwargs=arguments,
            compute=pool,
            max_task_retries=-1,  # a host that went down costs one a second, until Ray takes it for dead
            max_restarts=ACTOR_RESTARTS,
            label_selector=score.label_selector or None,
            **resources,
        )
    )


def is_little_work(score: Score, sizes: list[int], tokens: int) -> bool:
    """Whether the driver scores everything on a CPU sooner than actors, which must start, would.

    Args:
        sizes: bytes of each model's weights; 0 where they are unknown.
        tokens: of all parts to score.
    """
    import torch

    if score.num_actors != "auto" or score.backend != "transformers" or 0 in sizes or sum(sizes) > FEW_BYTES:
        return False
    if KERNELS and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return False  # whoever used torch before us has fixed kernels that workers do not have
    return tokens * sum(max(size, LEAST_BYTES) for size in sizes) <= LITTLE_WORK


def _score_here(items: list[Result], arguments: dict[str, Any]) -> Iterator[Result]:
    """Score in this process, then restore the settings that an actor changes."""
    import torch
    from transformers.utils import logging as transformers_logging

    threads = torch.get_num_threads()
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        yield from results(map_batches(items, ScoringActor(**arguments), here=len(items)))
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def pool_size(score: Score, gpu: bool, parts: int, model_bytes: int) -> tuple[int, int]:
    """Fewest and most actors, by the config and by what the cluster has."""
    kind, wanted = ("GPU", score.gpus_per_actor) if gpu else ("CPU", score.cpus_per_actor)
    # a value may be more than a word: !spot, in(a, b)
    plain = {key: value for key, value in score.label_selector.items() if re.fullmatch(r"[\w.-]+", value)}
    fitting = [node for node in ray.nodes() if node["Alive"] and plain.items() <= node["Labels"].items()]
    nodes = [int(node["Resources"].get(kind, 0)) for node in fitting]
    room = sum(have // wanted for have in nodes)  # an actor is on one node
    if score.num_actors != "auto":
        if not room:
            say(f"no node has {wanted} {kind}s for an actor (score.{kind.lower()}s_per_actor) yet: waiting for one")
        return score.num_actors if isinstance(score.num_actors, tuple) else (score.num_actors, score.num_actors)
    if score.label_selector:
        raise UserError("score.num_actors: auto counts all nodes: with a label_selector give a number or [min, max]")
    if room == 0:
        raise UserError(
            f"score.num_actors: auto is as many as there is room for, but of {wanted} {kind}s for each actor "
            f"(score.{kind.lower()}s_per_actor) no node has more than {max(nodes)}: ask for fewer, or, where nodes are "
            "still to come, give a number or [min, max]"
        )
    if not gpu:
        # float32 weights, twice what bfloat16 files hold, and at most half of the memory for them
        memory = ray.cluster_resources().get("memory", 0)
        room = max(1, min(room, int(memory / 2 / max(2 * model_bytes, 1 << 28))))
    size = min(room, parts)
    return size, size
