"""Work on the workers of a Ray cluster: joining it, mapping items over it, and what is said of what fails there.

Input: a list of JSON-able items and what to do with each. Output: small results, in any order. What the work is:
`pipeline`, `score_actors`.
"""

import itertools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from tokenclean_ray.errors import UserError
from tokenclean_ray.imports import KERNELS
from tokenclean_ray.layout import GOES_ON, Damaged
from tokenclean_ray.memory import keep_freed_memory
from tokenclean_ray.storage import AT_ONCE, ENDPOINT, failure, failures, side_by_side

MAX_BLOCKS = 4096  # Ray Data's bookkeeping is per block; a block is what is tried again after a fault
FEW_PARTS = 4  # work on so few takes the driver less time than workers take to start
FEW_READS = 1000  # the like, of small files
ASKED = "RAY_gcs_server_port_wait_time_s"  # how often Ray asks for a cluster, 40 s each without a word; by itself 20
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # tasks are parallel to each other
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    **KERNELS,
}

Result = dict[str, Any]
Batch = dict[str, Any]


def connect(endpoint_url: str | None = None) -> None:
    """Join the cluster that RAY_ADDRESS or the machine names, or start one here; quiet.

    Args:
        endpoint_url: of the config; all processes of the run then look for s3:// there.

    Raises:
        UserError: there is no joining it.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:  # it has its own, and does not ask its parent
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)  # what it logs as an error it raises, too
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):  # of a Ray that starts here it is seconds, not tries
            os.environ.setdefault(ASKED, "2")
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # of a variable that the job sets too, ours counts
        environment = WORKER_ENVIRONMENT | ({ENDPOINT: endpoint_url} if endpoint_url else {})
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": environment})
        except (ValueError, RuntimeError, ConnectionError, RayError) as error:
            # an address, a token, another version; a cluster that is gone
            raise UserError(f"the Ray cluster cannot be joined: {' '.join(str(error).split())}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 0  # its restarts have failed by then
    context.execution_no_progress_timeout_s = -1  # a part may take an hour, and nodes a night to come


def map_batches(
    items: list[Any], work: Any, blocks: int = MAX_BLOCKS, here: int = FEW_PARTS, **how: Any
) -> Iterator[Batch]:
    """Map JSON-able items, in any order.

    Args:
        work: a function, or a class whose instances are called, from a batch, see `items_of`, to a batch; a batch is a
            block, so that what one gave is never joined with what another, which failed, did.
        blocks: that the items are divided into, at most.
        here: so few items are work for this process, not for the cluster; by default each item is a part.
        how: for `Dataset.map_batches`; a class wants `here=0`, since this process calls `work` as it is.

    Raises:
        Damaged: all the files that were found so, once everything else is done.
        UserError: what `guarded` caught in a worker; workers that keep dying; what else fails in Ray.
    """
    borders = np.linspace(0, len(items), min(len(items), blocks) + 1).astype(int)
    rows = [json.dumps(items[begin:end]) for begin, end in itertools.pairwise(borders)]
    alone = (work({"items": [row]}) for row in rows)
    damaged: dict[str, str] = {}
    try:
        for batch in alone if len(items) <= here else _on_cluster(rows, work, how):
            if "user_error" in batch:
                raise UserError(batch["user_error"][0])
            if "damaged" in batch:
                damaged |= json.loads(batch["damaged"][0])
            else:
                yield batch
    except RayTaskError:  # a bug of ours
        raise
    except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
        raise UserError(
            f"workers keep dying ({failure(error)}): if for lack of memory, lower score.batch_tokens or "
            f"score.num_actors; Ray's logs know more; {GOES_ON}"
        ) from error
    except (RayError, ExecutionTimeoutError) as error:
        raise UserError(f"Ray failed ({failure(error)}); its logs know more; {GOES_ON}") from error
    if damaged:
        raise Damaged(damaged)


def _on_cluster(rows: list[str], work: Any, how: dict[str, Any]) -> Iterator[Batch]:
    dataset = ray.data.from_items([{"items": row} for row in rows], override_num_blocks=len(rows))
    with warnings.catch_warnings():
        # gone in Ray 2.64, which pyproject.toml leaves out; until then nothing else bounds restarts and retries
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        mapped = dataset.map_batches(work, batch_size=1, **how)  # of a block's one row; for GPUs Ray wants a number
    yield from mapped.iter_batches(batch_size=None, prefetch_batches=0)


def items_of(batch: Batch) -> list[Any]:
    """The items of a batch, which is of one row: a list of them as JSON."""
    return json.loads(batch["items"][0])


def guarded(work: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
    """Errors that need no traceback as results: Ray would wrap the exception in a traceback and lose its type."""

    def guarded_work(batch: Batch) -> Batch:
        keep_freed_memory()
        try:
            return work(batch)
        except Damaged as error:
            return {"damaged": [json.dumps(error.files)]}
        except UserError as error:
            return {"user_error": [str(error)]}
        except failures() as error:
            return {"user_error": [f"{failure(error)}; {GOES_ON}"]}

    return guarded_work


def each(function: Callable[[Any], list[Any]], at_once: int = 1) -> Callable[[Batch], Batch]:
    """A function from an item to JSON-able results → one from batches to batches, whose `results` they are.

    Args:
        at_once: threads, where a store's answers are what takes the time.
    """

    def attempt(item: Any) -> tuple[list[Any], dict[str, str]]:
        try:
            return function(item), {}
        except Damaged as error:
            return [], error.files

    def work(batch: Batch) -> Batch:
        found: list[str] = []
        damaged: dict[str, str] = {}
        for made, files in side_by_side(attempt, items_of(batch), at_once):
            found += map(json.dumps, made)
            damaged |= files
        if damaged:
            raise Damaged(damaged)
        return {"result": found}

    return guarded(work)


def results(batches: Iterable[Batch]) -> Iterator[Any]:
    """What the functions of `each` returned."""
    for batch in batches:
        yield from (json.loads(result) for result in batch["result"])


def map_each(
    items: list[Any], function: Callable[[Any], list[Any]], here: int = FEW_PARTS, at_once: int = 1
) -> Iterator[Any]:
    """The results of a function of each item, in any order; see `map_batches` and `each`."""
    blocks = min(MAX_BLOCKS, -(-len(items) // at_once))
    return results(map_batches(items, each(function, at_once), blocks, here))


def read_each(items: list[Any], function: Callable[[Any], list[Any]]) -> Iterator[Any]:
    """`map_each` for what does nothing but wait for a store: many items at once in each process."""
    return results(map_batches(items, each(function, AT_ONCE), blocks=few_blocks(), here=FEW_READS))


def few_blocks() -> int:
    """So many that all CPUs have work to the end, and so few that each block has many of the items."""
    return 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))


def on_gpu(device: str) -> bool:
    """Whether models go to GPUs: as model.device says, or else where the cluster has one now."""
    return device == "gpu" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def versions() -> dict[str, str]:
    """Of what decides the figures, for run.json."""
    return {name: version(name) for name in ("ray", "torch", "transformers", "pyarrow", "numpy")} | {
        "cpus": str(os.cpu_count())
    }
