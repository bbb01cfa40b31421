"""A masked dataset as training reads it: the same rows from memory, a disk or a store, and damage that is named."""

from collections import Counter
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from test_train import masked_rows, write_masked

from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import IGNORED, Rows
from tokenclean_ray.masked_rows import MaskedRows, check_rows
from tokenclean_ray.models import describe


def test_a_damaged_page_is_refused(tmp_path):
    """Uncompressed token ids: only the page's checksum knows that they changed."""
    ids = np.arange(1000, 1400, dtype=np.int32)
    table = pa.table({"input_ids": [ids], "labels": [ids]})
    path, good = tmp_path / "b.parquet", tmp_path / "a.parquet"
    pq.write_table(table, good)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = path.read_bytes()
    place = data.index(np.int32(1200).tobytes())
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    assert pq.read_table(path)["input_ids"][0].as_py()[200] == 1200 | 0xFF  # what would be trained on
    with pytest.raises(UserError, match=f"^train.data cannot be read as rows of input_ids and labels: {path}: .*CRC"):
        MaskedRows((str(good), str(path)))
    pq.write_table(table.drop_columns("labels"), path)
    with pytest.raises(UserError, match=f": {path}: "):
        MaskedRows((str(good), str(path)))


def test_memory_mapped_rows_equal_rows_in_memory(tmp_path):
    rows = Rows.of(write_masked(tmp_path / "data", masked_rows()))
    nothing_kept = pq.read_table(tmp_path / "data" / "part-0.parquet").slice(0, 0)
    pq.write_table(nothing_kept, tmp_path / "data" / "part-.parquet")
    mapped = MaskedRows(tuple(str(p) for p in sorted((tmp_path / "data").iterdir())))
    np.testing.assert_array_equal(mapped.lengths, rows.lengths)
    np.testing.assert_array_equal(mapped.kept, rows.kept)
    some = np.array([7, 0, 29])
    for one, other in zip(vars(mapped.take(some)).values(), vars(rows.take(some)).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_of_an_object_store_are_copied_once(tmp_path, bucket, asked, monkeypatch):
    """By a request a file and a listing; also where the hub is out of reach, as in these tests."""
    monkeypatch.setattr("tokenclean_ray.masked_rows.DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    rows = Rows.of(write_masked(tmp_path / "data", masked_rows(), parts=20))
    saved = Dataset.from_parquet([str(tmp_path / "data" / f"part-{n}.parquet") for n in range(20)])
    saved.save_to_disk(str(tmp_path / "saved"))
    fs = fsspec.filesystem("s3")
    for folder in ("data", "saved"):
        fs.put(str(tmp_path / folder), f"{bucket}/{folder}", recursive=True)
    asked.clear()
    files = tuple(f"{bucket}/data/part-{n}.parquet" for n in range(20))
    for wanted in (files, (f"{bucket}/saved",)):
        found = [MaskedRows(wanted) for _ in range(2)]  # as two ranks of a node
        for mapped in found:
            for one, other in zip(vars(mapped.take(np.arange(30))).values(), vars(rows).values(), strict=True):
                np.testing.assert_array_equal(one, other)
    assert Counter(asked) == {"get_object": 20 + len(list((tmp_path / "saved").iterdir())), "list_objects_v2": 4}
    copy = next((tmp_path / "cache").glob("*/000000.parquet"))
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=f"their copy {copy.parent} is damaged, delete that"):
        MaskedRows(files)
    copy.write_bytes(whole)
    write_masked(tmp_path / "other", masked_rows(4), parts=1)
    fs.put(str(tmp_path / "other" / "part-0.parquet"), files[0])
    assert len(MaskedRows(files).lengths) == len(rows.lengths) - 2 + 4
    fs.rm(files[3])
    with pytest.raises(UserError, match="cannot be read as rows of input_ids and labels"):
        MaskedRows(files)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(np.arange(4, 9, dtype=np.int32), np.full(5, IGNORED, np.int32))], "no token to train on"),
        ([(np.array([5, 999], np.int32),) * 2], "another tokenizer"),
        ([(np.arange(4, 80, dtype=np.int32),) * 2], "positions for 64"),
    ],
)
def test_rows_that_cannot_train_the_model(tmp_path, start, rows, message):
    write_masked(tmp_path / "data", rows, parts=1)
    spec = replace(describe(start), position_limit=64)
    with pytest.raises(UserError, match=message):
        check_rows(MaskedRows((str(tmp_path / "data" / "part-0.parquet"),)), spec)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        ([[5, 6, 7], [8, 9]], [[-100, 6, 7], [9, -100]]),  # shifted
        ([[5, 6, 7], [8, 9]], [[-100, 6, 7], [8]]),
        ([[5, 6, 7], [8, 9]], [[-100, 6, 7], None]),
        ([[5, 6, 7], []], [[-100, 6, 7], []]),
    ],
)
def test_labels_that_are_not_the_row_s_own_tokens(tmp_path, ids, labels):
    pq.write_table(pa.table({"input_ids": ids, "labels": labels}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1: labels must be as many as input_ids"):
        MaskedRows((str(tmp_path / "a.parquet"),))


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    table = pa.table({"input_ids": [[1, 2]], "labels": [[-100, 2]]})
    for folder in ("run [1]", "run 1"):  # the second is what the first would match
        (tmp_path / folder).mkdir()
        pq.write_table(table.slice(0, folder == "run [1]"), tmp_path / folder / "a*b?.parquet")
    assert MaskedRows((str(tmp_path / "run [1]" / "a*b?.parquet"),)).lengths.tolist() == [2]


def test_files_without_the_columns(tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="rows of input_ids and labels"):
        MaskedRows((str(tmp_path / "a.parquet"),))
