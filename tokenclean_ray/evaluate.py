"""`tokenclean evaluate MODEL... --suite paper|FILE`: benchmarks of lm-evaluation-harness, on the cluster.

Input: model folders or hub ids, and a suite: tasks with their shots and metric. Output: in a folder
results/<model>/<task>-….json, committed as each is done, so that the same command runs what is missing; and
evaluation.json, .md and .png, models × tasks.
"""

import functools
import importlib.metadata
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import ray
import vl_convert
from pydantic import Field, ValidationError

from tokenclean_ray import workers
from tokenclean_ray.config import Section
from tokenclean_ray.config_file import explain, read_yaml
from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError, nearest, redact
from tokenclean_ray.layout import GOES_ON, Store, run_folder
from tokenclean_ray.lock import hold
from tokenclean_ray.models import ModelSpec, describe, hash_files, local_folder, read_config
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.storage import failure

SUITES = Path(__file__).parent / "suites"
WORKER_DEATHS = 5  # of one task: by then it is not the machine that is to blame
# averages of the paper's seven tasks, by plan: arXiv 2502.01968, means over three seeds of training
PLANS = ("warm-up", "full tokens", "random 60 %", "RHO", "fixed", "self-evolving")
PAPER = {
    "LLaMA-3.2-3B": (48.87, 49.17, 48.97, 51.67, 51.83, 53.00),
    "LLaMA-3.1-8B": (55.93, 56.10, 56.47, 58.20, 58.77, 59.33),
    "Mistral-7B-v0.3": (55.20, 54.93, 54.53, 55.07, 55.30, 54.93),
}
# what a config.json says of them: type, hidden size, layers, vocabulary
BASES = {
    ("llama", 3072, 28, 128256): "LLaMA-3.2-3B",
    ("llama", 4096, 32, 128256): "LLaMA-3.1-8B",
    ("mistral", 4096, 32, 32768): "Mistral-7B-v0.3",
}


class Task(Section):
    """A task or group of the harness, or a local one."""

    task: str
    shots: Annotated[int, Field(ge=0)]
    metric: str = "acc"

    @property
    def title(self) -> str:
        """What tells it from the suite's others."""
        return f"{self.task}, {self.shots}-shot {self.metric}"


class Suite(Section):
    """What models are measured on."""

    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    include: str | None = None
    """A folder of local task files in the harness's format, relative to the suite's file; every node must see it."""


Figures = dict[str, Any]
"""Of a model on a task: `value` and `stderr` (None where there is none) in percent, and `samples`."""


def load_suite(name: str) -> Suite:
    """Read a suite: `paper`, or a YAML file.

    Raises:
        UserError: no such file, or one that is no suite.
    """
    file = SUITES / f"{name}.yaml" if (SUITES / f"{name}.yaml").is_file() else Path(name)
    if not file.is_file():
        known = [path.stem for path in SUITES.glob("*.yaml")]
        raise UserError(f"--suite {name}: no such file{nearest(name, known)}; known by name: {', '.join(known)}")
    try:
        suite = Suite.model_validate(read_yaml(file, f"--suite {name}"))
    except ValidationError as error:
        raise UserError(f"--suite {name}: {explain(error, Suite)}") from error
    if suite.include is None:
        return suite
    folder = (file.parent / suite.include).resolve()
    if not folder.is_dir():
        raise UserError(f"--suite {name}: include {suite.include}: no such folder")
    return suite.model_copy(update={"include": str(folder)})


def evaluate(
    models: list[str],
    suite_name: str,
    out: str,
    limit: int | None = None,
    batch_size: str = "8",
    gpus: int | None = None,
) -> str:
    """Measure models on a suite; returns the table as Markdown.

    Args:
        out: a folder; results that are there are kept.
        limit: rows of each task, for a first look; None for all.
        batch_size: rows of a forward pass, or auto.
        gpus: of each model, also where nodes with some are still to come; None: one where the cluster has some.

    Raises:
        UserError: a model or task that is not there; tasks that failed, once the others are done.
    """
    try:
        harness = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("evaluate wants lm-evaluation-harness: pip install '.[evaluate]'") from None
    suite = load_suite(suite_name)
    _check_tasks(suite)
    specs = [describe(model) for model in models]
    store = Store(run_folder(out))
    with hold(store, "evaluate"):
        workers.connect()
        of_each = _gpus(gpus)
        # all that decides a result but the weights, which are in the model's name
        shared = [_local_tasks(suite), limit, _dtype(of_each), harness]
        names = {
            (spec, task): f"results/{spec.name}/{task.task}-{digest([task.task, task.shots, tokenizer, *shared])}.json"
            for spec in specs
            for tokenizer in [_tokenizer_files(spec)]
            for task in suite.tasks
        }
        failed = _run_missing(store, names, suite, limit, batch_size, of_each)
        rows = [_row(store, spec, {task: names[spec, task] for task in suite.tasks}, failed) for spec in specs]
        text = _table(rows, suite, limit) + (_paper(rows) if suite_name == "paper" else "")
        store.write_json("evaluation.json", {"suite": suite.model_dump(), "lm_eval": harness, "models": rows})
        store.write_bytes("evaluation.md", text.encode())
        store.write_bytes("evaluation.png", _figure(rows))
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}; {GOES_ON}\n\n{text}")
    return text


def _gpus(wanted: int | None) -> int:
    """GPUs of each model; 0 for CPUs, where none are asked for and the cluster has none."""
    have = int(_largest("GPU"))
    if wanted is None:
        return min(1, have)
    if 0 < have < wanted:
        raise UserError(f"--gpus is {wanted}, but no node has more than {have}")
    if not have:
        say(f"no node has a GPU yet, and --gpus is {wanted}: waiting for one; without --gpus it is done on CPUs")
    return wanted


def _largest(resource: str) -> float:
    """How much of a resource the node has that has most of it."""
    return max((node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"]), default=0)


@functools.cache
def _tasks(include: str | None) -> Any:
    """The harness's tasks and those of a folder; to index them takes a quarter of a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _check_tasks(suite: Suite) -> None:
    manager = _tasks(suite.include)
    known = set(manager.all_tasks) - set(manager.all_tags)
    for task in suite.tasks:
        if task.task in manager.all_tags:
            raise UserError(f"{task.task} is a tag, which has no result of its own: list its tasks, or define a group")
        if task.task not in known:
            raise UserError(f"the harness has no task {task.task}{nearest(task.task, known)}")


def _local_tasks(suite: Suite) -> str:
    """Of the suite's folder, whatever lies in it."""
    files = sorted(Path(suite.include).rglob("*")) if suite.include else []
    return hash_files([file for file in files if file.is_file() and "__pycache__" not in file.parts])


def _tokenizer_files(spec: ModelSpec) -> str:
    """Of what else a folder's model is loaded with; of the hub's the commit, and with it all files."""
    if spec.revision:
        return spec.revision
    folder = Path(local_folder(spec.path))
    return hash_files(
        sorted(
            file
            for name in ("*token*.json", "vocab*", "merges.txt", "*.model", "generation*.json")
            for file in folder.glob(name)
        )
    )


def _dtype(gpus: int) -> str:
    return "bfloat16" if gpus else "float32"


def _run_missing(
    store: Store,
    names: dict[tuple[ModelSpec, Task], str],
    suite: Suite,
    limit: int | None,
    batch_size: str,
    gpus: int,
) -> list[str]:
    """One Ray task a model and benchmark; returns what failed, each in a line."""
    missing = {file: key for key, file in names.items() if store.read_json(file) is None}
    if not missing:
        say(f"evaluate   all {len(names)} results are there")
        return []
    # named here, GPUs make Ray give each task a process of its own: what one leaves there, or breaks, the next finds
    measure, waiting = ray.remote(num_gpus=gpus)(_measure), {}
    index = ray.put(_tasks(suite.include))  # workers read it within a second
    room = _largest("memory")  # Ray would wait for ever for a node that has more
    for file, (spec, task) in missing.items():
        memory = 0 if gpus else min(2 * spec.bytes, room)  # float32 weights: twice what files in bfloat16 hold
        run = measure.options(num_cpus=1, memory=memory, max_retries=WORKER_DEATHS)
        waiting[run.remote(store, file, spec, task, index, limit, batch_size, gpus)] = (spec, task)
    failed = []
    with Stage("evaluate", len(missing)) as stage:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            spec, task = waiting.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:  # whatever a task of the harness does; the others go on
                why = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                failed.append(f"{task.task} of {spec.path}: {failure(why)}")
                say(failed[-1])
            stage.advance()
    return failed


def _measure(
    store: Store,
    file: str,
    spec: ModelSpec,
    task: Task,
    index: Any,
    limit: int | None,
    batch_size: str,
    gpus: int,
) -> None:
    """In a worker: run the harness and commit what it found, all metrics.

    Args:
        index: of `_tasks`.
    """
    from lm_eval import simple_evaluate

    how = {"device": "cuda" if gpus else "cpu", "dtype": _dtype(gpus), "parallelize": gpus > 1}
    found = simple_evaluate(
        "hf",
        {"pretrained": local_folder(spec.path), "revision": spec.revision or "main", **how},
        tasks=[task.task],
        num_fewshot=task.shots,
        batch_size=batch_size if batch_size == "auto" else int(batch_size),
        limit=limit,
        task_manager=index,
        log_samples=False,
    )
    store.write_json(file, result_of(found, task))


def result_of(found: dict[str, Any], task: Task) -> dict[str, Any]:
    """What is kept of what the harness found of a task: `figures`, its metrics by name, and `samples`, its rows.

    Raises:
        UserError: the harness gave other shots, because the task's own file fixes them; a group without figures.
    """
    given = set(found["n-shot"].values())
    if given != {task.shots}:
        shots = ", ".join(map(str, sorted(given)))
        raise UserError(f"task {task.task} fixes its shots at {shots}, not {task.shots}: write that into the suite")
    figures = {key: value for key, value in found["results"].get(task.task, {}).items() if "," in key}
    if not figures:
        raise UserError(f"group {task.task} has no figures: give it an aggregate_metric_list")
    rows = sum(counts["effective"] for counts in found["n-samples"].values())  # of all the tasks of a group
    return {"figures": figures, "samples": rows}


def figures_of(result: dict[str, Any], task: Task) -> Figures:
    """The metric that a suite asks for, in percent.

    Raises:
        UserError: the task has no such metric, has it by several filters, or it is no share of 1.
    """
    figures = {key: value for key, value in result["figures"].items() if "_stderr" not in key}
    metrics = [key for key in figures if task.metric in (key, key.partition(",")[0])]
    if not metrics:
        known = {key.partition(",")[0] for key in figures}
        raise UserError(f"task {task.task} has no metric {task.metric}, but {', '.join(sorted(known))}")
    if len(metrics) > 1:
        raise UserError(f"task {task.task} has {task.metric} by several filters: name one, {' or '.join(metrics)}")
    name, _, filtered = metrics[0].partition(",")
    value, error = figures[metrics[0]], result["figures"].get(f"{name}_stderr,{filtered}")
    if not 0 <= value <= 1:
        raise UserError(f"task {task.task}: {name} is {value:g}, no share of 1 as the tables' percent: leave it out")
    error = 100 * error if isinstance(error, float) else None
    return {"value": 100 * value, "stderr": error, "samples": result["samples"]}


def _row(store: Store, spec: ModelSpec, names: dict[Task, str], failed: list[str]) -> dict[str, Any]:
    """A model's results by task, and their plain average with its standard error, where none is missing.

    Args:
        failed: gets a line for each result that has no such metric.
    """
    found: dict[str, Figures | None] = {}
    for task, file in names.items():
        result = store.read_json(file)
        try:
            found[task.title] = result and figures_of(result, task)
        except UserError as error:
            found[task.title] = None
            failed.append(str(error))
    known = [figures for figures in found.values() if figures]
    on_hub = not spec.path.startswith("/") and "://" not in spec.path
    row: dict[str, Any] = {
        "model": spec.path if on_hub else spec.name,
        "path": redact(spec.path),
        "fingerprint": spec.fingerprint,
    }
    row |= {"base": _known_base(spec), "tasks": found, "average": None}
    if len(known) == len(found):
        errors = [figures["stderr"] for figures in known]
        value = sum(figures["value"] for figures in known) / len(known)
        row["average"] = {"value": value, "stderr": None if None in errors else math.hypot(*errors) / len(known)}
    return row


def _known_base(spec: ModelSpec) -> str | None:
    """Which of the paper's base models a model is of the shape of."""
    config = read_config(spec.path, spec.trusted, spec.revision).get_text_config()
    shape = (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size)
    return BASES.get(shape)


def _table(rows: list[dict[str, Any]], suite: Suite, limit: int | None) -> str:
    titles = [task.title for task in suite.tasks]
    lines = ["| model | " + " | ".join(titles) + " | average |", "|---" * (len(titles) + 2) + "|"]
    for row in rows:
        cells = [_cell(row["tasks"][title]) for title in titles]
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {_cell(row['average']) if row['average'] else ''} |")
    only = f", the first {limit} rows of each task alone" if limit else ""
    return "\n".join([*lines, f"\nPercent ± standard error of each model by itself, not of a difference{only}.\n"])


def _cell(result: Figures | None) -> str:
    if result is None:
        return "failed"
    return f"{result['value']:.2f}" + ("" if result["stderr"] is None else f" ± {result['stderr']:.2f}")


def _paper(rows: Iterable[dict[str, Any]]) -> str:
    """The paper's averages for the base models that are here."""
    bases = dict.fromkeys(row["base"] for row in rows if row["base"])
    if not bases:
        return ""
    lines = ["\nThe paper's averages (arXiv 2502.01968):\n", "| base | " + " | ".join(PLANS) + " |"]
    lines.append("|---" * (len(PLANS) + 1) + "|")
    lines += [f"| {base} | {' | '.join(f'{value:.2f}' for value in PAPER[base])} |" for base in bases]
    return "\n".join(lines) + "\n"


def _figure(rows: list[dict[str, Any]]) -> bytes:
    """A panel a task: each model's value with two standard errors to either side."""
    points = [
        {"task": title, "model": row["model"], "value": found["value"], "error": 2 * (found["stderr"] or 0)}
        for row in rows
        for title, found in (row["tasks"] | {"average": row["average"]}).items()
        if found
    ]
    y = {"field": "model", "type": "nominal", "title": None, "sort": None}
    x = {"field": "value", "type": "quantitative", "title": "percent, ± 2 standard errors", "scale": {"zero": False}}
    chart = {
        "data": {"values": points},
        "facet": {"field": "task", "type": "nominal", "title": None, "sort": list(rows[0]["tasks"])},
        "columns": 4,
        "spec": {
            "width": 180,
            "height": {"step": 18},
            "layer": [
                {"mark": "errorbar", "encoding": {"y": y, "x": x, "xError": {"field": "error"}}},
                {"mark": {"type": "point", "filled": True}, "encoding": {"y": y, "x": x}},
            ],
        },
        "resolve": {"scale": {"x": "independent"}},
    }
    return vl_convert.vegalite_to_png(chart, scale=1.5)
