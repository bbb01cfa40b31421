"""`tokenclean inspect RUN`: rows of a finished run in the terminal, kept tokens in green, dropped ones red and struck.

Without colours dropped text stands between [- and -]. Control characters of the data are written out, see `visible`.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.text import Text

from tokenclean_ray.errors import UserError, nearest
from tokenclean_ray.finished import Finished, ScoredPart, open_finished, read_scored, row_tokens, sample_parts, visible
from tokenclean_ray.tokens import MANY


def show_rows(
    url: str, row: str | None, source: str | None, most_dropped: bool, count: int, trusted: bool = False
) -> None:
    """Print rows of a run: a named one, some of a source, those that lost the largest share, or any.

    Args:
        row: PART:ROW, as the report and the masked dataset name it.
        trusted: as of `open_finished`.

    Raises:
        UserError: no finished run, no such row, no row of that source among those read.
    """
    finished = open_finished(url, trusted)
    console = Console(highlight=False)
    chosen = iter([_named(finished, row)]) if row else _found(finished, source, most_dropped)
    for scored, index in itertools.islice(chosen, count):
        _show(console, finished, scored, index)


def _named(finished: Finished, name: str) -> tuple[ScoredPart, int]:
    part, colon, number = name.rpartition(":")
    if not colon or not number.isdigit():
        raise UserError(f"--row {name} is not of the form PART:ROW, such as {finished.manifest['parts'][0]}:0")
    chosen = next((c for c in finished.selections if part in c.parts), None)
    if chosen is None:
        parts = [p for c in finished.selections for p in c.parts]
        raise UserError(f"the run has no {part or 'part without a name'}{nearest(part, parts)}")
    scored = read_scored(finished, chosen, part)
    at = np.flatnonzero(scored.tokens.row_numbers == int(number))
    if not len(at):
        raise UserError(f"{part} has no row {number}: it was rejected, or the part has fewer rows")
    return scored, int(at[0])


def _found(finished: Finished, source: str | None, most_dropped: bool) -> Iterator[tuple[ScoredPart, int]]:
    if source is not None and source not in finished.sources and MANY not in finished.sources:
        raise UserError(f"the run has no source {source}{nearest(source, finished.sources)}")
    found: Iterator[tuple[ScoredPart, int]] = (
        (scored, row)
        for scored in sample_parts(finished)
        for row, of in enumerate(scored.sources)
        if source in (None, of)
    )
    if most_dropped:
        found = iter(sorted(found, key=lambda place: -place[0].dropped[place[1]]))
    first = next(found, None)
    if first is None:
        raise UserError(f"no row of {source} among those read: name one as --row PART:ROW")
    return itertools.chain([first], found)


def _show(console: Console, finished: Finished, scored: ScoredPart, row: int) -> None:
    of_row = scored.tokens.row == row
    kept, score = scored.keep[of_row], scored.tokens.score[of_row]
    figures = f"{kept.sum():,} of {len(kept):,} answer tokens kept, {kept.mean():.1%}; mean score"
    for name, which in (("kept", kept), ("dropped", ~kept)):
        values = score[which][np.isfinite(score[which])]
        figures += f" {values.mean():.3f} {name}" if len(values) else f" – {name}"
    for name, losses in scored.losses.items():
        figures += f"; {name} loss {losses[of_row].mean():.3f}"
    round = f"  round {scored.round}" if scored.round else ""
    where = f"{scored.tokens.part}:{scored.tokens.row_numbers[row]}{round}  {visible(scored.sources[row])}"
    console.print(Text(where, "bold"), soft_wrap=True)
    console.print(Text(figures, "dim"), soft_wrap=True)
    console.print(
        _coloured(finished, scored, row, bool(console.color_system) and not console.no_color),
        soft_wrap=True,
        end="\n\n",
    )


def _coloured(finished: Finished, scored: ScoredPart, row: int, colours: bool) -> Text:
    text = Text()
    pieces = row_tokens(finished, scored, row)
    for dropped, group in itertools.groupby(pieces, lambda p: not isinstance(p, str) and not p["keep"]):
        marks = ("[-", "-]") if dropped and not colours else ("", "")
        text.append(marks[0])
        for piece in group:
            if isinstance(piece, str):
                text.append(piece, "dim")
            else:
                text.append(piece["text"], "red strike" if dropped else "green")
        text.append(marks[1])
    return text
