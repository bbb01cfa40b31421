"""The command `tokenclean`, and what the scripts in jobs/ call.

The config is read before anything heavy is imported, so that a typo costs a fraction of a second.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable

from tokenclean_ray import __version__
from tokenclean_ray.config import UserError, load_config


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for what the user can mend, said in one line."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"tokenclean: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenclean: stopped; the same command goes on where this run ended", file=sys.stderr)
        return 130
    return 0


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
    _with_config(
        commands,
        "clean",
        _clean,
        "Score every response token under a base and a reference model, keep the top share, write the masked dataset.",
        "examples:\n"
        "  tokenclean clean run.yaml\n"
        "  tokenclean clean run.yaml select.keep_ratio=0.5 output=runs/half\n\n"
        "The same command again finishes what is missing; a changed keep_ratio redoes\nthe selection alone.",
    )
    demo = commands.add_parser(
        "demo",
        help="the whole of it on a small task that it makes itself",
        description="Make a noisy dataset, a base and a reference model, clean the data and show what was dropped.",
        epilog="example: tokenclean demo --output demo",
    )
    demo.add_argument("--output", default="demo", help="folder for the data, the models and the run (default: demo)")
    demo.set_defaults(run=_demo)
    return parser


def _with_config(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    description: str,
    examples: str,
) -> None:
    command = commands.add_parser(
        name,
        help=description.split(",")[0].lower(),
        description=textwrap.fill(description, 78),  # the formatter that keeps the examples' lines wraps nothing
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", metavar="run.yaml", help="the run's config")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="replaces a value of the config")
    command.set_defaults(run=run)


def _clean(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from tokenclean_ray import rounds, summary

    summary.show_clean(rounds.clean(config))


def _demo(options: argparse.Namespace) -> None:
    from tokenclean_ray import demo

    demo.run(options.output)
