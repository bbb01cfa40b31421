"""What a run prints when it ends, from the contents of its run.json."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tokenclean_ray.selection import NEAR


def show_clean(record: dict[str, Any]) -> None:
    """Counts, kept share per source, the threshold and where the result is, on standard output."""
    console = Console(highlight=False)
    counts, threshold = record["counts"], record["threshold"]
    rows = f"rows {counts['rows']:,} = masked {counts['masked']:,} + nothing kept {counts['nothing_kept']:,}"
    console.print(f"{rows} + rejected {counts['rejected']:,}")
    for reason, count in list(counts["rejected_reasons"].items())[:3]:
        console.print(f"  rejected: {reason}: {count:,}", markup=False)
    console.print(f"tokens {counts['tokens']:,}, of them response {counts['response_tokens']:,}")
    table = Table("source", "response tokens", "kept", "share", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    sources = list(threshold["sources"].items())
    for name, source in sources[:20]:
        table.add_row(
            name, f"{source['tokens']:,}", f"{source['kept']:,}", f"{source['kept'] / max(source['tokens'], 1):.1%}"
        )
    if len(sources) > 20:
        table.add_row(f"… and {len(sources) - 20} more", "", "", "")
    tokens, kept = threshold["tokens"], threshold["kept"]
    table.add_row("all", f"{tokens:,}", f"{kept:,}", f"{kept / tokens:.1%}")
    console.print(table)
    if "score" in threshold:
        console.print(
            f"threshold {threshold['score']:.6g} nats ({threshold['ties']:,} tokens have just this score), "
            f"{threshold['near']:,} tokens within {NEAR} nats of it"
        )
    console.print("seconds " + ", ".join(f"{k.removesuffix('_s')} {v:.1f}" for k, v in record["timings"].items()))
    console.print(f"masked dataset: {record['result']['path']}", soft_wrap=True)
