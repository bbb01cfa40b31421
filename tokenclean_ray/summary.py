"""What a run prints when it ends, from the contents of its run.json."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenclean_ray.finished import visible
from tokenclean_ray.selection import NEAR

SWEPT_SOURCES = 20
LOG_WIDTH = 200  # columns, where there is no terminal: a table's cells are not folded


def show_clean(record: dict[str, Any]) -> None:
    """Counts, kept share per source, the threshold and where the result is, on standard output."""
    console = _console()
    counts, threshold = record["counts"], record["threshold"]
    _show_rows(console, counts)
    table = _table("source", "response tokens", "kept", "share")
    sources = list(threshold["sources"].items())
    for name, source in sources[:20]:
        share = f"{source['kept'] / max(source['tokens'], 1):.1%}"
        table.add_row(visible(name), f"{source['tokens']:,}", f"{source['kept']:,}", share)
    if len(sources) > 20:
        table.add_row(f"… and {len(sources) - 20} more", "", "", "")
    tokens, kept = threshold["tokens"], threshold["kept"]
    table.add_row("all", f"{tokens:,}", f"{kept:,}", f"{kept / tokens:.1%}")
    console.print(table)
    if "score" in threshold:
        console.print(
            f"threshold {threshold['score']:.6g}; tokens with just this score: {threshold['ties']:,}, "
            f"within {NEAR} of it: {threshold['near']:,}",
            soft_wrap=True,
        )
    if "calibration" in threshold:
        _show_calibration(console, threshold["calibration"])
    if record.get("changes"):
        console.print(_changes(record["changes"]), soft_wrap=True)
    _show_end(console, record)


def _changes(found: dict[str, Any]) -> str:
    drift = "" if found["drift"] is None else f", scores of new rows {found['drift']:.3f} from theirs (KS)"
    return (
        f"since {found['since']}: rows {found['rows_new']:,} new, {found['rows_removed']:,} removed, "
        f"{found['rows_unchanged']:,} unchanged, whose labels {found['labels_gained']:,} tokens gained and "
        f"{found['labels_lost']:,} lost{drift}"
    )


def show_sweep(record: dict[str, Any]) -> None:
    """What each ratio would keep, and what becomes of planted noise, on standard output."""
    console = _console()
    rows, calibration = record["sweep"], record["calibration"]
    table = _table("ratio", "threshold", "kept", f"within {NEAR} of it", "bound, δ 0.05")
    for row in rows:
        score = "" if row["score"] is None else f"{row['score']:.4g}"
        table.add_row(f"{row['ratio']:g}", score, f"{row['kept']:,}", f"{row['near']:,}", f"+{row['bound']:.4f}")
    console.print(table)
    totals: dict[str, int] = {name: tokens for name, (tokens, _) in rows[0]["sources"].items()}
    if len(totals) > 1:
        table = _table("kept of source, at ratio", *(f"{row['ratio']:g}" for row in rows))
        for name in sorted(totals, key=lambda name: -totals[name])[:SWEPT_SOURCES]:
            table.add_row(visible(name), *(f"{row['sources'][name][1] / max(totals[name], 1):.0%}" for row in rows))
        console.print(table)
    if (scope := record["config"]["select"]["scope"]) != "global":
        console.print(f"ranked over all tokens here; by scope: {scope}, which clean goes by, other tokens are kept")
    if len(totals) > SWEPT_SOURCES:
        console.print(f"of {len(totals):,} sources the {SWEPT_SOURCES} largest")
    if calibration:
        table = _table("ratio", "planted dropped", "genuine dropped", "noise among kept, at most")
        for row in calibration["ratios"]:
            dropped = _interval(row["planted_dropped"]), _interval(row["genuine_dropped"])
            table.add_row(f"{row['ratio']:g}", *dropped, f"{row['noise_kept']:.1%}")
        console.print(table)
        _show_calibration(console, calibration)


def _show_calibration(console: Console, calibration: dict[str, Any]) -> None:
    """What became of planted noise, with 95 % intervals."""
    auroc, random, other = (_interval(calibration[f"auroc{of}"], ".3f") for of in ("", "_random", "_other_rows"))
    console.print(
        f"planted noise: {calibration['planted']:,} tokens in copies of {calibration['rows']:,} rows; "
        f"AUROC {auroc} (random {random}, of other rows {other})"
    )
    console.print(f"noise like it in the pool: at most {calibration['noise_share']:.1%}")
    if "gates" in calibration:
        table = _table(f"gate on {calibration['gate_on']}", "planted outside", "genuine outside")
        for row in calibration["gates"]:
            table.add_row(f"{row['gate']:g}", _interval(row["planted_dropped"]), _interval(row["genuine_dropped"]))
        console.print(table)


def show_evolve(record: dict[str, Any]) -> None:
    """Rounds, plans side by side, and where the results are, on standard output."""
    console = _console()
    _show_rows(console, record["counts"])
    rounds = _table("plan", "round", "held-out loss", "kept", "threshold", "agreement", "accepted")
    for outcome in record["rounds"]:
        held = outcome.get("held_out") or {}
        rounds.add_row(
            outcome["plan"],
            str(outcome["round"]),
            _loss(held.get("loss"), held.get("standard_error")),
            f"{outcome['kept_share']:.1%}",
            "" if outcome["threshold"] is None else f"{outcome['threshold']:.4g}",
            "" if outcome.get("agreement") is None else f"{outcome['agreement']:.1%}",
            "yes" if outcome["accepted"] else "no",
        )
    console.print(rounds)
    plans = _table("plan", "rounds", "held-out loss", "kept", "tokens trained", "seconds")
    for row in record["comparison"]:
        plans.add_row(
            row["plan"],
            f"{row['accepted']}/{row['rounds']}",
            _loss(row["held_out_loss"], row["standard_error"]),
            f"{row['kept_share']:.1%}",
            f"{row['tokens_trained']:,}",
            f"{row['seconds']:.1f}",
        )
    console.print(plans)
    console.print(f"model: {record['result_model']}", soft_wrap=True)
    _show_end(console, record)


def show_train(record: dict[str, Any]) -> None:
    """Steps, tokens, loss and where the model is, on standard output."""
    console = _console()
    curve = record["loss"]
    console.print(
        f"{record['steps']:,} steps over {record['tokens']:,} kept tokens in {record['seconds']:.1f} s, "
        f"loss {curve[0]:.4f} at the first, {curve[-1]:.4f} at the last"
    )
    console.print(f"model: {record['path']}", soft_wrap=True)


def _show_rows(console: Console, counts: dict[str, Any]) -> None:
    rows = f"rows {counts['rows']:,} = masked {counts['masked']:,} + nothing kept {counts['nothing_kept']:,}"
    left = f" + not selected from {counts['warmup']:,}" if counts["warmup"] else ""
    console.print(f"{rows} + rejected {counts['rejected']:,}{left}")
    for reason, count in list(counts["rejected_reasons"].items())[:3]:
        console.print(f"  rejected: {reason}: {count:,}")
    console.print(f"tokens {counts['tokens']:,}, of them response {counts['response_tokens']:,}")


def _show_end(console: Console, record: dict[str, Any]) -> None:
    console.print("seconds " + ", ".join(f"{k.removesuffix('_s')} {v:.1f}" for k, v in record["timings"].items()))
    console.print(f"masked dataset: {record['result']['path']}", soft_wrap=True)


def _console() -> Console:
    """Prints texts as they are: sources are of the data, and [/x] in them is no markup."""
    width = None if sys.stdout.isatty() else LOG_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column(first, overflow="fold")  # of many paths the ends tell which they are
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _interval(found: dict[str, float], written: str = ".1%") -> str:
    return f"{found['value']:{written}} [{found['low']:{written}}, {found['high']:{written}}]"


def _loss(loss: float | None, error: float | None) -> str:
    return "" if loss is None else f"{loss:.4f} ± {error:.4f}"
