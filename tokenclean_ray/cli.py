"""The command `tokenclean`, and what the scripts in jobs/ call.

The config is read before anything heavy is imported, so that a typo costs a fraction of a second.
"""

import argparse
import sys
import textwrap
import traceback
from types import TracebackType

from tokenclean_ray import __version__
from tokenclean_ray.config import UserError, load_config, redact

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
        "  tokenclean evolve run.yaml data.warmup=seed.jsonl\n"
        "  tokenclean evolve run.yaml 'evolve.plans=[full, fixed, self_evolving]'\n\n"
        "The same command again goes on; rounds that are done stay done.",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for what the user can mend, said in one line."""
    options = _parser().parse_args(arguments)
    sys.excepthook = _show_without_secrets
    try:
        options.run(options)
    except UserError as error:
        print(f"tokenclean: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenclean: stopped; the same command goes on where this run ended", file=sys.stderr)
        return 130
    return 0


def _show_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def run_job(command: str) -> None:
    """Run one command with this process's arguments and exit: the body of a script in jobs/."""
    sys.exit(main([command, *sys.argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenclean",
        description="Find the response tokens worth training on in supervised fine-tuning data.",
        epilog="example: tokenclean clean run.yaml select.keep_ratio=0.5",
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
        job.add_argument("config", metavar="run.yaml", help="the run's config")
        job.add_argument("overrides", metavar="section.key=value", nargs="*", help="replaces a value of the config")
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
        description="Train a small model from scratch, plant noise, run every plan with several seeds, compare them.",
        epilog="examples:\n  tokenclean study --seeds 5\n"
        "  tokenclean study --seeds 3 --data train.jsonl --test test.jsonl --model small-model",
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
    return parser


def _run_config(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides, options.command)
    from tokenclean_ray import rounds, summary

    match options.command:
        case "clean":
            summary.show_clean(rounds.clean(config))
        case "sweep":
            summary.show_sweep(rounds.sweep(config))
        case "train":
            summary.show_train(rounds.train(config))
        case "evolve":
            summary.show_evolve(rounds.evolve(config))


def _demo(options: argparse.Namespace) -> None:
    from tokenclean_ray import demo

    demo.run(options.output)


def _study(options: argparse.Namespace) -> None:
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {options.seeds}")
    from tokenclean_ray import study

    settings = study.SWEEP if options.sweep else study.CORE
    if options.data:
        if not (options.test and options.model):
            raise UserError("--data wants --test, clean rows, and --model, what the base is trained from")
        settings = study.text_settings(study.study_text.Text(options.data, options.test, options.model))
    study.run(options.output, range(options.seeds), settings, options.workers)
