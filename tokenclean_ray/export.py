"""`tokenclean export RUN --to FORMAT --out DIR`: the masked dataset as a trainer takes it.

Input: a finished run. Output: a local folder, written beside its place and renamed when it is complete, so that no
trainer ever reads half of it. A few parts are in memory at a time.

Labels and masks are token-aligned: label t is the token at t, and the trainers below shift by themselves.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean_ray import export_card
from tokenclean_ray.errors import UserError
from tokenclean_ray.finished import Finished, open_finished, whole
from tokenclean_ray.schema import TOKENS, flat_lists, list_column
from tokenclean_ray.storage import side_by_side

PARTS_A_FILE = 256  # about 100 MB; the hub takes 10,000 files a folder
PARTS_AHEAD = 4
MARK = ".tokenclean.json"  # hidden, so that no loader takes it for data


@dataclass(frozen=True)
class Format:
    """What a trainer takes."""

    columns: tuple[str, ...]
    """Those that are written, see `_column`; none are named: the masked dataset as it is."""
    file: str
    """Name pattern; the suffix says the kind."""
    snippet: str
    """How to train from it; {out} is the folder, {base} the model, {max_length} the longest row."""


FORMATS = {
    "hf": Format(
        (),
        "data/train-{n:05d}-of-{of:05d}.parquet",
        "from datasets import load_dataset\n\n"
        'rows = load_dataset("{out}", split="train")  # input_ids, labels, id, source …',
    ),
    "trl": Format(
        ("input_ids", "labels"),
        "part-{n:05d}.parquet",
        "from datasets import load_dataset\n"
        "from trl import SFTConfig, SFTTrainer\n\n"
        'rows = load_dataset("parquet", data_files="{out}/*.parquet", split="train")\n'
        "# TRL 0.19.1 or newer: older ones train on every token without a word\n"
        "# max_length: the default of 1024 would cut rows\n"
        "# without a GPU also use_cpu=True, bf16=False\n"
        'settings = SFTConfig(output_dir="model", max_length={max_length}, packing=False)\n'
        'SFTTrainer("{base}", args=settings, train_dataset=rows).train()',
    ),
    "axolotl": Format(
        ("input_ids", "attention_mask", "labels"),
        "part-{n:05d}.parquet",
        "# axolotl train config.yaml, with\n"
        "base_model: {base}\n"
        "datasets:\n"
        "  - path: {out}\n"
        "    split: train\n"
        "    type:                # empty: the rows are tokenized\n"
        "sequence_len: {max_length}",
    ),
    "llamafactory": Format(
        ("input_ids", "attention_mask", "labels"),
        "data-{n:05d}-of-{of:05d}.arrow",
        "# llamafactory-cli train config.yaml, with\n"
        "stage: sft\n"
        "do_train: true\n"
        "model_name_or_path: {base}\n"
        "tokenized_path: {out}\n"
        "cutoff_len: {max_length}",
    ),
    "skyrl": Format(
        ("input_ids", "loss_mask"),
        "part-{n:05d}.parquet",
        '# SkyRL\'s SFT trainer, with\npretokenized_dataset_paths: ["{out}"]\nmax_length: {max_length}',
    ),
    "verl": Format(
        ("input_ids", "loss_mask", "attention_mask", "position_ids"),
        "part-{n:05d}.parquet",
        "# pretokenized.py, the dataset class of verl's SFT trainer\n"
        "from datasets import load_dataset\n"
        "from torch.utils.data import Dataset\n\n\n"
        "class Pretokenized(Dataset):\n"
        "    def __init__(self, parquet_files, *args, **kwargs):\n"
        "        files = parquet_files if isinstance(parquet_files, str) else list(parquet_files)\n"
        '        rows = load_dataset("parquet", data_files=files, split="train")\n'
        '        self.rows = rows.with_format("torch")\n\n'
        "    def __len__(self):\n"
        "        return len(self.rows)\n\n"
        "    def __getitem__(self, index):\n"
        "        return self.rows[index]\n\n"
        "# torchrun -m verl.trainer.sft_trainer data.train_files='{out}/*.parquet' data.pad_mode=no_padding \\\n"
        "#   data.custom_cls.path=pretokenized.py data.custom_cls.name=Pretokenized model.path={base}",
    ),
}


def export(url: str, to: str, out: str, license: str = "unknown") -> str:
    """Write a run's snapshot in a trainer's format; returns the snippet that trains from it.

    Args:
        url: the run folder.
        to: a key of `FORMATS`.
        out: a local folder that is empty, not there, or this very export.
        license: for the dataset card of hf.

    Raises:
        UserError: no finished run, a folder that holds something else.
    """
    if "://" in out:
        raise UserError(f"--out {out}: export to a local folder and copy it from there, or --push it to the hub")
    finished, target = open_finished(url), Path(out).expanduser().absolute()
    identity = {"run": finished.store.url, "selection": finished.manifest["selection"], "to": to, "license": license}
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        mark = target / MARK
        if not mark.is_file() or mark.read_text(encoding="utf-8") != _as_text(identity):
            raise UserError(f"--out {out} holds something else: name a new folder, or delete it")
    else:
        _write(finished, FORMATS[to], to, target, identity)
    record = finished.record
    return FORMATS[to].snippet.format(
        out=target, base=record["models"]["base"]["path"], max_length=record["config"]["data"]["max_length"]
    )


def _write(finished: Finished, format: Format, to: str, target: Path, identity: dict[str, Any]) -> None:
    """Everything beside the target, then rename; what an earlier attempt left there is removed."""
    partial = target.with_name(f".{target.name}.tokenclean-partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts, files = finished.manifest["parts"], []
    groups = [parts[start : start + PARTS_A_FILE] for start in range(0, len(parts), PARTS_A_FILE)]
    for n, group in enumerate(groups):
        files.append(partial / format.file.format(n=n, of=len(groups)))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        schema = _write_file(files[-1], side_by_side(lambda part: _table(finished, format, part), group, PARTS_AHEAD))
    if to == "llamafactory":
        _describe_saved_dataset(partial, files, schema, json.dumps(identity))
    if to == "hf":
        (partial / "README.md").write_text(export_card.card(finished, identity["license"]), encoding="utf-8")
    (partial / MARK).write_text(_as_text(identity), encoding="utf-8")
    for path in partial.rglob("*"):
        _sync(path)
    os.replace(partial, target)  # onto nothing, or onto an empty folder


def _as_text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, indent=2) + "\n"


def _table(finished: Finished, format: Format, part: str) -> pa.Table:
    with whole(finished.store):
        rows = finished.store.read_part(finished.snapshot, part).replace_schema_metadata(None)
    return pa.table({name: _column(rows, name) for name in format.columns}) if format.columns else rows


def _column(rows: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    """One of the masked rows' own columns, or one that follows from their token ids and labels."""
    ids, offsets = flat_lists(rows["input_ids"])
    match name:
        case "attention_mask":
            values = np.ones_like(ids)
        case "loss_mask":
            values = flat_lists(rows["labels"])[0] != -100
        case "position_ids":
            values = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        case _:
            return rows[name]
    return list_column(values, offsets, TOKENS)


def _write_file(file: Path, tables: Iterator[pa.Table]) -> pa.Schema:
    """One table after another; returns their schema."""
    first = next(tables)
    open_writer = pa.ipc.new_stream if file.suffix == ".arrow" else pq.ParquetWriter
    with open_writer(str(file), first.schema) as writer:
        for table in itertools.chain([first], tables):
            if table.num_rows:  # `datasets` fails on a first row group without rows
                writer.write_table(table)
    return first.schema


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _describe_saved_dataset(folder: Path, files: list[Path], schema: pa.Schema, identity: str) -> None:
    """What `datasets.load_from_disk` wants beside the Arrow files that `save_to_disk` would have written."""
    import datasets

    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
    info.write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def push(folder: str, repository: str) -> str:
    """Send an exported folder to the hub as a dataset; returns its address.

    Raises:
        UserError: the hub refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, repo_type="dataset", ignore_patterns=MARK,
            delete_patterns="data/*.parquet",  # of a push before, whose files had other names
            commit_message="Add the masked dataset",
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"--push {repository}: the hub refuses ({reason}); log in with `hf auth login`") from error
    return f"{api.endpoint}/datasets/{repository}"
