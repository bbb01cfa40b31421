"""A masked dataset on disk, as training reads it: checked, and taken by rows. Needs no Ray.

Input: Parquet files with input_ids and labels, or a folder that `datasets` saved. Output: `finetune.Rows`.
"""

import glob
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk
from datasets.config import DOWNLOADED_DATASETS_PATH
from datasets.exceptions import DatasetGenerationError
from fsspec.utils import tokenize
from pyarrow.dataset import ParquetFragmentScanOptions

from tokenclean_ray.errors import UserError, why
from tokenclean_ray.finetune import IGNORED, Rows, count_kept
from tokenclean_ray.models import ModelSpec
from tokenclean_ray.schema import flat_lists
from tokenclean_ray.storage import copy_once, filesystem

COLUMNS = ["input_ids", "labels"]
READ_ROWS = 10_000  # at a time


class MaskedRows:
    """A masked dataset on disk, memory-mapped; two numbers a row are in memory."""

    def __init__(self, files: tuple[str, ...]) -> None:
        """Open Parquet files, or one folder that `datasets` saved; raises `UserError` where they are no such rows."""
        of_copy = ""
        try:
            if "://" in files[0]:
                files, folder = _copies(files)
                of_copy = f"; if only their copy {folder} is damaged, delete that"
            if len(files) == 1 and not files[0].endswith(".parquet"):
                data = load_from_disk(files[0]).select_columns(COLUMNS)
            else:
                verified = ParquetFragmentScanOptions(page_checksum_verification=True)
                data = Dataset.from_parquet(
                    [glob.escape(file) for file in files],  # it would take a folder's [ for a pattern's
                    columns=COLUMNS,
                    fragment_scan_options=verified,
                    batch_size=READ_ROWS,  # by default as many as a file's first row group has, and that may be none
                )
        except (DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
            here = files if "://" not in files[0] else ()  # else it was the copying that failed
            which = next((f"{file}: " for file in here if not _is_readable(file)), "")
            raise UserError(
                "train.data cannot be read as rows of input_ids and labels: "
                f"{which}{why(error.__cause__ or error)}{of_copy}"
            ) from error
        self._data = data.with_format("arrow")
        lengths, kept, largest = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], -1
        for table in self._data.iter(batch_size=READ_ROWS):
            ids, offsets = flat_lists(table["input_ids"])
            labels, ends = flat_lists(table["labels"])
            _check_labels(ids, offsets, labels, ends, sum(map(len, lengths)))
            lengths.append(np.diff(offsets))
            kept.append(count_kept(labels, offsets))
            largest = max(largest, int(ids.max(initial=-1)))
        self.lengths, self.kept, self.largest_id = np.concatenate(lengths), np.concatenate(kept), largest

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows, in the order asked for."""
        if not len(rows):
            return Rows.of([])
        table = self._data[rows.tolist()]
        ids, offsets = flat_lists(table["input_ids"])
        labels, _ = flat_lists(table["labels"])
        return Rows(ids, labels, offsets)


def _is_readable(file: str) -> bool:
    """Whether a Parquet file is; `datasets` does not say which one is not."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            for _ in parquet.iter_batches(READ_ROWS, columns=COLUMNS):
                pass
            return set(COLUMNS) <= set(parquet.schema_arrow.names)
    except (pa.ArrowException, OSError):
        return False


def _copies(files: tuple[str, ...]) -> tuple[tuple[str, ...], Path]:
    """Files of an object store, or one folder, copied to this machine once, to where `datasets` keeps what it fetches.

    It would fetch them itself, but asks for each file five times, mostly one after another, and of no store at all
    where HF_HUB_OFFLINE is set. Returns what to open, and the folder of the copies.
    """
    fs, where = filesystem(files[0])
    fs.invalidate_cache()  # they may have been written again since
    paths = [filesystem(file)[1] for file in files]
    is_folder = not where.endswith(".parquet")
    folders = paths if is_folder else {path.rpartition("/")[0] for path in paths}
    found = {info["name"]: info for folder in folders for info in fs.ls(folder, detail=True) if info["type"] == "file"}
    if is_folder:
        copied = {path.rpartition("/")[2]: path for path in found}
    else:
        copied = {f"{n:06d}.parquet": path for n, path in enumerate(paths)}
    known = [found.get(path) or fs.info(path) for path in copied.values()]  # contents have a tag or a time in there
    target = Path(DOWNLOADED_DATASETS_PATH, tokenize(known))
    copy_once(fs, copied, target)
    return ((str(target),) if is_folder else tuple(str(target / name) for name in copied)), target


def _check_labels(ids: np.ndarray, offsets: np.ndarray, labels: np.ndarray, ends: np.ndarray, before: int) -> None:
    """Raise `UserError` at a row whose labels are not its own tokens, some of them masked; `before`: rows before it."""
    wrong = np.diff(offsets) != np.diff(ends)
    if not wrong.any():
        other = np.append((labels != ids) & (labels != IGNORED), False)
        wrong = (np.diff(offsets) == 0) | (np.add.reduceat(other, offsets[:-1]) > 0)
    if wrong.any():
        raise UserError(
            f"train.data, row {before + int(wrong.argmax())}: labels must be as many as input_ids, at least one, and "
            f"each its own token or {IGNORED}: they are not shifted"
        )


def check_rows(rows: MaskedRows, start: ModelSpec) -> None:
    """Raise `UserError` where the rows cannot train the model."""
    if not rows.kept.sum():
        raise UserError("train.data has no token to train on: every label is -100, or there are no rows")
    if rows.largest_id >= start.vocabulary:
        raise UserError(
            f"train.data holds token id {rows.largest_id}, but {start.path} embeds {start.vocabulary}: "
            "the data was made with another tokenizer; set train.model to a model that shares it"
        )
    longest = int(rows.lengths.max())
    if start.position_limit is not None and longest > start.position_limit:
        raise UserError(
            f"train.data has rows of {longest} tokens, but {start.path} has positions for {start.position_limit}: "
            "make it again with a lower data.max_length"
        )
