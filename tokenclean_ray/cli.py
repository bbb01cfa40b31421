"""The command `tokenclean`, and what the scripts in jobs/ call.

The config is read before anything heavy is imported, so that a typo costs a fraction of a second.
"""

import argparse
import os
import signal
import sys
import textwrap
import traceback
from types import TracebackType

from tokenclean_ray import __version__
from tokenclean_ray.config_file import load_config
from tokenclean_ray.errors import UserError, redact
from tokenclean_ray.imports import heavy_imports

# command that takes a config → (description, examples)
JOBS = {
    "clean": (
        "Score every response token under a base and a reference model, keep the top share, write the masked dataset.",
        "examples:\n"
        "  tokenclean clean run.yaml\n"
        "  tokenclean clean run.yaml select.keep_ratio=0.5 output=runs/half\n\n"
        "The same command again finishes what is missing; a changed keep_ratio redoes\nthe selection alone.",
    ),
    "sweep": (
        "Say what each keep ratio from 0.1 to 0.9 would keep, from the losses that clean makes or has made.",
        "examples:\n"
        "  tokenclean sweep run.yaml\n"
        "  tokenclean sweep run.yaml 'select.calibrate={share: 0.02}'\n\n"
        "With select.calibrate noise is planted in copies of some rows, and the table\n"
        "also says how much of it each ratio and gate drops.",
    ),
    "train": (
        "Fine-tune a model on a masked dataset, sharded over the cluster; write an ordinary Hugging Face folder.",
        "examples:\n"
        "  tokenclean train run.yaml train.data=runs/gsm8k\n"
        "  tokenclean train run.yaml train.method=full train.num_workers=8\n\n"
        "The same command again goes on from the newest checkpoint.",
    ),
    "evolve": (
        "Clean in rounds, the model trained on one round's tokens being the next one's reference; compare plans.",
        "examples:\n"
        "  tokenclean evolve run.yaml data.warmup=seed.jsonl model.reference=null\n"
        "  tokenclean evolve run.yaml 'evolve.plans=[full, fixed, self_evolving]'\n\n"
        "The same command again goes on; rounds that are done stay done.",
    ),
}
GPUS = ("a100", "a10g", "b200", "h100", "h100-pcie", "h200", "l4", "l40s", "mi300x", "rtx4090")
TRUST = "run the Python code that the base's tokenizer brings, if it brings some"
EXPORTS = ("hf", "trl", "axolotl", "llamafactory", "skyrl", "verl")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for what the user can mend, said in one line."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and (not hasattr(options, "overrides") or any(other.startswith("-") for other in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:  # overrides behind a flag, which argparse does not put to those before it
        options.overrides += others
    sys.excepthook = _show_without_secrets
    try:
        options.run(options)
        sys.stdout.flush()  # here, where a reader that has left is looked for
    except UserError as error:
        print(f"tokenclean: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # of SIGTERM Ray makes the latter
        if isinstance(stop, SystemExit) and stop.code == 1:  # rich makes it where whoever reads has seen enough
            return 1
        print("tokenclean: stopped; the same command goes on where this run ended", file=sys.stderr)
        return 128 + (signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _failures() as error:
        from tokenclean_ray.storage import failure

        why = redact(failure(error))
        print(f"tokenclean: error: {why}; the same command goes on once that is mended", file=sys.stderr)
        return 2
    return 0


def _failures() -> tuple[type[Exception], ...]:
    """What storage raises; asked for only when something is raised."""
    from tokenclean_ray.storage import failures

    return failures()


def _show_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def run_job(command: str) -> None:
    """Run one command with this process's arguments and exit: the body of a script in jobs/."""
    sys.exit(main([command, *sys.argv[1:]]))


class _Commands(argparse.RawDescriptionHelpFormatter):
    """One line a command, and none that says COMMAND above them: the list fits a terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 15  # argparse forgets the indentation of commands

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if action.nargs == argparse.PARSER else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenclean",
        description="Find the response tokens worth training on in supervised fine-tuning data,\n"
        "for example: tokenclean clean run.yaml select.keep_ratio=0.5",
        formatter_class=_Commands,
    )
    parser.add_argument("--version", action="version", version=f"tokenclean_ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (description, examples) in JOBS.items():
        job = commands.add_parser(
            name,
            help=description.split(",")[0].lower(),
            description=textwrap.fill(description, 78),  # the formatter that keeps the examples' lines wraps nothing
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _takes_config(job)
        job.set_defaults(run=_run_config, command=name)
    demo = commands.add_parser(
        "demo",
        help="the whole of it on a small task that it makes itself",
        description="Make a noisy dataset, a base and a reference model, clean the data and show what was dropped.",
        epilog="example: tokenclean demo --output demo",
    )
    demo.add_argument("--output", default="demo", help="folder for the data, the models and the run (default: demo)")
    demo.set_defaults(run=_demo)
    study = commands.add_parser(
        "study",
        help="when cleaning helps: every plan on tasks with planted noise",
        description="Train a small model, plant noise, run every plan with several seeds, compare.",
        epilog="examples:\n  tokenclean study --seeds 5\n"
        "  tokenclean study --data train.jsonl --test test.jsonl --model small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    study.add_argument("--sweep", action="store_true", help="other noise, warm-ups, gates and ratios instead")
    study.add_argument("--data", help="rows of real text, instead of the made-up task; with --test and --model")
    study.add_argument("--test", help="clean rows that models are measured on")
    study.add_argument("--model", help="folder of a small model that the base is trained from")
    study.add_argument("--workers", type=int, help="trials at a time (default: one a core)")
    study.add_argument("--output", default="jobs/results/study", help="folder (default: jobs/results/study)")
    study.set_defaults(run=_study)
    benchmark = commands.add_parser(
        "benchmark",
        help="how fast the package is here",
        description="Measure the machine, then one thing on it; append the record.",
        epilog="examples:\n  tokenclean benchmark score --data train.jsonl --baseline\n"
        "  tokenclean benchmark select --tokens 100000000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_argument(
        "what",
        choices=["score", "select", "train", "clean", "scale", "precision"],
        help="losses, the cut, training, a run, more rows, dtypes",
    )
    benchmark.add_argument("--data", help="rows of a file (default: made-up ones)")
    benchmark.add_argument("--rows", type=int, default=1000, help="all but select: how many (default: 1000)")
    benchmark.add_argument("--baseline", action="store_true", help="score, train, clean: what people write first too")
    benchmark.add_argument("--tokens", type=int, default=10_000_000, help="select: how many (default: 10000000)")
    benchmark.add_argument("--long", action="store_true", help="score, precision: made-up rows of 2,048 tokens")
    benchmark.add_argument(
        "--models",
        nargs="+",
        metavar="M",
        default=["13M"],
        help="score, train: 1B or 3B; precision: too, or two folders",
    )
    benchmark.add_argument("--record", default="jobs/results/benchmarks.jsonl", help="file that the result is added to")
    benchmark.set_defaults(run=_benchmark)
    status = commands.add_parser(
        "status",
        help="how far a run is, or how it ended; from anywhere",
        description="Read a run folder: who is at work, which stage, how far, time left; last error, last result.",
        epilog="example: tokenclean status s3://your-bucket/runs/nightly",
    )
    _takes_run(status)
    status.set_defaults(run=_status)
    report = commands.add_parser(
        "report",
        help="write a finished run's report.html again",
        description="Write RUN/report.html: counts, scores, sources, tokens and rows, on one page that works offline.",
        epilog="example: tokenclean report runs/gsm8k",
    )
    _takes_run(report)
    report.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    report.set_defaults(run=lambda options: _write_report(options.folder, options.trust_remote_code))
    inspect = commands.add_parser(
        "inspect",
        help="rows of a finished run in the terminal, in colour",
        description="Print rows of a finished run: kept tokens green, dropped ones red and struck.",
        epilog="example: tokenclean inspect runs/gsm8k --most dropped -n 3",
    )
    _takes_run(inspect)
    inspect.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="PART:ROW", help="this row, as the report names it")
    which.add_argument("--source", help="rows of this source")
    which.add_argument("--most", choices=["dropped"], help="the rows that lost the largest share")
    inspect.add_argument("-n", type=int, default=5, metavar="ROWS", help="how many (default: 5)")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser(
        "export",
        help="the masked dataset as a trainer takes it",
        description="Write a finished run's masked dataset for a trainer, and print how to train from it.",
        epilog="example: tokenclean export runs/gsm8k --to trl --out exports/gsm8k",
    )
    _takes_run(export)
    export.add_argument("--to", required=True, choices=EXPORTS, help="the trainer")
    export.add_argument("--out", required=True, metavar="DIR", help="a local folder, new or empty")
    export.add_argument("--license", default="unknown", help="of the data, for the dataset card of hf")
    export.add_argument("--push", metavar="owner/name", help="also send it to the Hugging Face hub (hf)")
    export.set_defaults(run=_export)
    evaluate = commands.add_parser(
        "evaluate",
        help="benchmarks over several models, side by side",
        description="Run benchmarks of lm-evaluation-harness on the cluster; write one table models by tasks.",
        epilog="example: tokenclean evaluate my/base runs/gsm8k/models/trained-1a2b3c4d --suite paper --out evaluation",
    )
    evaluate.add_argument("models", metavar="MODEL", nargs="+", help="a folder or a hub id")
    evaluate.add_argument(
        "--suite", required=True, metavar="paper|FILE", help="the paper's seven tasks, or a YAML file"
    )
    evaluate.add_argument("--out", default="evaluation", help="folder for the results (default: evaluation)")
    evaluate.add_argument("--limit", type=int, metavar="ROWS", help="of each task, for a first look")
    evaluate.add_argument("--batch-size", default="8", metavar="ROWS", help="of a forward pass, or auto (default: 8)")
    evaluate.add_argument("--gpus", type=int, help="of each model (default: 1 where there are some)")
    evaluate.set_defaults(run=_evaluate)
    init = commands.add_parser(
        "init",
        help="write a commented run.yaml for a data file",
        description="Look at the first rows of some data, name their format, write a commented config.",
        epilog="example: tokenclean init data.jsonl --base my/base --reference my/tuned",
    )
    init.add_argument("path", metavar="FILE", help="data: a file, a folder, a quoted glob or hf://datasets/owner/name")
    init.add_argument("--out", default="run.yaml", help="the config to write (default: run.yaml)")
    init.add_argument("--base", default="path-or-hub-id", help="the model to be trained")
    init.add_argument("--reference", default="path-or-hub-id", help="the base tuned on clean data")
    init.set_defaults(run=_init)
    estimate = commands.add_parser(
        "estimate",
        help="what a run will cost, before any GPU is rented",
        description="Read a sample: rows, tokens, FLOPs, GPU-hours and disk, with the error of the estimate.",
        epilog="example: tokenclean estimate run.yaml --gpu h100",
    )
    _takes_config(estimate)
    known = f"{', '.join(GPUS)} (default: h100)"
    estimate.add_argument("--gpu", metavar="GPU", choices=GPUS, default="h100", help=known)
    estimate.set_defaults(run=_estimate)
    return parser


def _run_config(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides, options.command)
    with heavy_imports():
        from tokenclean_ray import rounds, summary

    trusted = config.model.trusts(str(config.model.base))
    match options.command:
        case "clean":
            summary.show_clean(rounds.clean(config))
            _write_report(config.output, trusted)
        case "sweep":
            summary.show_sweep(rounds.sweep(config))
        case "train":
            summary.show_train(rounds.train(config))
        case "evolve":
            summary.show_evolve(rounds.evolve(config))
            _write_report(config.output, trusted)


def _takes_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="run.yaml", help="the run's config")
    command.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="replaces a value of the config"
    )


def _takes_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="the run folder; a local path, s3:// or gs://")


def _at_least_1(options: dict[str, int | None]) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")


def _demo(options: argparse.Namespace) -> None:
    from tokenclean_ray import demo

    demo.run(options.output)


def _benchmark(options: argparse.Namespace) -> None:
    _at_least_1({"--rows": options.rows, "--tokens": options.tokens})
    from tokenclean_ray.benchmark.run import run

    names = ("what", "record", "data", "rows", "tokens", "baseline", "long", "models")
    run(**{name: getattr(options, name) for name in names})


def _status(options: argparse.Namespace) -> None:
    from tokenclean_ray.status import describe

    print(describe(options.folder))


def _write_report(folder: str, trusted: bool) -> None:
    from tokenclean_ray.report import write_report

    print(f"report: {write_report(folder, trusted)}")


def _inspect(options: argparse.Namespace) -> None:
    _at_least_1({"-n": options.n})
    from tokenclean_ray.inspect import show_rows

    show_rows(
        options.folder, options.row, options.source, options.most == "dropped", options.n, options.trust_remote_code
    )


def _export(options: argparse.Namespace) -> None:
    if options.push and options.to != "hf":
        raise UserError(f"--push wants --to hf, not {options.to}")
    from tokenclean_ray import export

    snippet = export.export(options.folder, options.to, options.out, options.license)
    print(f"exported to {options.out}; to train from it:\n\n{snippet}")
    if options.push:
        print(f"\nsent to {export.push(options.out, options.push)}")


def _evaluate(options: argparse.Namespace) -> None:
    _at_least_1({"--limit": options.limit, "--gpus": options.gpus})
    if options.batch_size != "auto" and not (options.batch_size.isdigit() and int(options.batch_size)):
        raise UserError(f"--batch-size must be a positive number or auto, not {options.batch_size}")
    from tokenclean_ray import evaluate

    how = (options.limit, options.batch_size, options.gpus)
    print(evaluate.evaluate(options.models, options.suite, options.out, *how))


def _init(options: argparse.Namespace) -> None:
    from tokenclean_ray.init import write_config

    print(f"{write_config(options.path, options.out, options.base, options.reference)}; wrote {options.out}")


def _estimate(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from tokenclean_ray import estimate

    estimate.show(estimate.estimate(config), options.gpu)


def _study(options: argparse.Namespace) -> None:
    _at_least_1({"--seeds": options.seeds, "--workers": options.workers})
    if options.data and not (options.test and options.model):
        raise UserError("--data wants --test, clean rows, and --model, what the base is trained from")
    if not options.data and (options.test or options.model):
        raise UserError("--test and --model are of --data, rows of your own, which is missing")
    if options.data and options.sweep:
        raise UserError("--sweep is of the made-up task, and --data of another: leave one out")
    from tokenclean_ray.study import real_text
    from tokenclean_ray.study import run as study

    settings = study.SWEEP if options.sweep else study.CORE
    if options.data:
        settings = study.text_settings(real_text.Text(options.data, options.test, options.model))
    study.run(options.output, range(options.seeds), settings, options.workers)
