"""What a person sees while a stage runs: a bar on a terminal, lines without one, as long as there is news.

`at_work` says the same to those who look at the run from elsewhere, see `lock` and `status`, and `watch` to whoever
counts, see `metrics`.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokenclean_ray.errors import redact

LINE_EVERY_S = 5.0
QUIET_S = 60.0  # most between two lines, where nothing was finished
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` runs

Figures = dict[str, Any]
"""How far a stage is: `name`; `parts`, `rows`, `tokens`; `parts_wanted`, `tokens_wanted`, 0 where not known; `unit`,
what its parts are; `note`; `seconds` since it began, and `counted`, how many of them had passed when it last
advanced."""

console = Console(stderr=True, highlight=False, emoji=False)
_newest: "Stage | None" = None
_run = ""
_watcher: Callable[[Figures, dict[str, int]], None] | None = None


def say(text: str) -> None:
    """A line about the run, on standard error; standard output is for results. In a submitted job it begins with the
    time and the run, since such logs are gathered."""
    if IN_A_JOB in os.environ:
        text = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {_run} {text}"
    console.print(redact(text), markup=False, soft_wrap=True)


def watch(run: str, watcher: Callable[[Figures, dict[str, int]], None]) -> None:
    """Name the run whose stages follow, and call a function when one begins or advances, with its figures and with what
    was finished since."""
    global _run, _watcher
    _run, _watcher = run, watcher


def speed(figures: Figures) -> str:
    """Tokens a second and the time left, of a stage's figures; empty before the first tokens."""
    if not figures["tokens"]:
        return ""
    seconds: float = figures["seconds"]
    counted: float = figures.get("counted", seconds)  # older versions did not write it
    wanted = figures["tokens_wanted"] - figures["tokens"]
    rate = figures["tokens"] / max(counted, 1e-9)
    left = wanted / rate - (seconds - counted)
    if wanted > 0 >= left:  # slower than it was
        rate = figures["tokens"] / max(seconds, 1e-9)
        left = wanted / rate
    return f", {rate:,.0f} tokens/s" + (f", {left:,.0f} s left" if left > 0 else "")


def at_work() -> Figures | None:
    """The figures of the newest stage of this process; None before the first."""
    return _newest.figures if _newest else None


class Stage:
    """Counts the parts, rows and tokens of one stage and shows them. A context manager."""

    def __init__(self, name: str, parts: int, tokens: int = 0, unit: str = "parts") -> None:
        """`tokens`: how many the stage will handle, where that is known; the time left follows from it."""
        self._name, self._unit, self._note = name, unit, ""
        self.expect(parts, tokens)
        self._done = {"parts": 0, "rows": 0, "tokens": 0}
        self._counted = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> "Stage":
        global _newest
        _newest = self
        self._start = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn(self._unit))
            self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[speed]}"), console=console)
            self._task = self._bar.add_task(self._name, total=self._parts or None, speed="")
            self._bar.start()
        else:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        self._tell({})
        return self

    def expect(self, parts: int, tokens: int) -> None:
        """How much there is to do, where that is known later than the stage begins."""
        self._parts, self._tokens = parts, tokens

    def advance(self, *, parts: int = 1, rows: int = 0, tokens: int = 0, note: str = "") -> None:
        """Count what has been finished; `note`: what else there is to say."""
        self._note = note
        done = {"parts": parts, "rows": rows, "tokens": tokens}
        for key, amount in done.items():
            self._done[key] += amount
        self._counted = self.seconds
        if self._bar:
            done_parts, total = self._done["parts"], self._parts or None
            self._bar.update(self._task, completed=done_parts, total=total, speed=self._speed())
        self._tell(done)

    def _tell(self, done: dict[str, int]) -> None:
        if _watcher:
            _watcher(self.figures, done)

    @property
    def figures(self) -> Figures:
        """How far it is."""
        wanted = {"parts_wanted": self._parts, "tokens_wanted": self._tokens}
        words = {"name": self._name, "unit": self._unit, "note": self._note}
        return {**words, **self._done, **wanted, "seconds": self.seconds, "counted": self._counted}

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._start

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            return
        self._stop.set()
        self._ticker.join()
        if error is None:
            self._line()

    def _tick(self) -> None:
        said, at = -1.0, 0.0
        while not self._stop.wait(LINE_EVERY_S):
            if self._counted != said or self.seconds - at >= QUIET_S:
                said, at = self._counted, self.seconds
                self._line()

    def _line(self) -> None:
        done = self._done
        wanted = f"{self._parts:,}" if self._parts else "?"
        counts = f"{done['parts']:,}/{wanted} {self._unit}"
        if done["rows"]:
            counts += f", {done['rows']:,} rows"
        say(f"{self._name:<10} {counts}{self._speed()}, {self.seconds:.0f} s")
        sys.stderr.flush()

    def _speed(self) -> str:
        return (f", {self._note}" if self._note else "") + speed(self.figures)
