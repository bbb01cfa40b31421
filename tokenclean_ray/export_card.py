"""The dataset card of an exported run: what it is, how it was made, how much of it is kept."""

from typing import Any

import yaml

from tokenclean_ray.finished import Finished, visible

TEXT = """# {title}

Supervised fine-tuning data whose labels are masked token by token: the answer tokens worth training on keep their
token as label, all others have -100. Made with [tokenclean_ray](https://arxiv.org/abs/2502.01968) {version}.

```python
from datasets import load_dataset

rows = load_dataset("OWNER/NAME", split="train")  # input_ids, labels; labels are not shifted
```

## How it was made

| | |
|---|---|
{made}

## Counts

| | |
|---|---|
{counts}

| source | answer tokens | kept | share |
|---|---|---|---|
{sources}
"""


def card(finished: Finished, license: str) -> str:
    """README.md of a dataset folder: the hub's metadata, then the text.

    Args:
        license: an identifier of the hub's list, such as apache-2.0.
    """
    record, select = finished.record, finished.select
    counts, models = record["counts"], record["models"]
    tokens = sum(tokens for tokens, _ in finished.sources.values())
    kept = sum(kept for _, kept in finished.sources.values())
    head = {
        "license": license,
        "task_categories": ["text-generation"],
        "tags": ["token-cleaning", "sft", "pretokenized"],
        "size_categories": [_size(counts["masked"])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    cuts = [f"{c.scores['']:.6g}" for c in finished.selections if "" in c.scores]
    made = {
        "method": f"{select['scorer']}, {select['scope']} top share",
        "keep ratio": select["keep_ratio"],
        "cut": ", ".join(cuts) or f"each {'source' if select['scope'] == 'source' else 'row'} has its own",
        **{f"{role} model": _model(m) for role, m in models.items()},
        "tokenizer": f"that of the base; fingerprint {finished.manifest['tokenizer']}",
        "template": f"{record['config']['data']['template']}, at most {record['config']['data']['max_length']} tokens",
    }
    numbers = {
        "rows in": counts["rows"], "rows here": counts["masked"],
        "rows with nothing kept, left out": counts["nothing_kept"], "rows rejected": counts["rejected"],
        "answer tokens": tokens, "answer tokens kept": kept,
    }  # fmt: skip
    sources = [f"| {_cell(s)} | {n:,} | {k:,} | {k / max(n, 1):.1%} |" for s, (n, k) in finished.sources.items()]
    text = TEXT.format(
        title=_cell(finished.store.url.rstrip("/").rpartition("/")[2]),
        version=record["tokenclean"],
        made="\n".join(f"| {name} | {value} |" for name, value in made.items()),
        counts="\n".join(f"| {name} | {value:,} |" for name, value in numbers.items()),
        sources="\n".join(sources[:100]),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}"


def _model(model: dict[str, Any]) -> str:
    """A hub id, or a folder's name: where it lies on one machine is nobody else's business."""
    path = model["adapter"] or model["path"]
    return f"{_cell(path.rpartition('/')[2] if path.startswith('/') else path)} ({model['fingerprint']})"


def _cell(text: Any) -> str:
    """Data in a Markdown table: no markup, no line end."""
    plain = " ".join(visible(str(text)).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "|`*_[]\\" else c for c in plain)


def _size(rows: int) -> str:
    """The hub's name for a number of rows."""
    limits = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    limits += [(10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B")]
    return next((name for limit, name in limits if rows < limit), "n>1B")
