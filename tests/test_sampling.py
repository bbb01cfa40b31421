"""Samples of files: small inputs whole, large ones in part, totals within their error of what is really there."""

import asyncio
import gzip
import json
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from conftest import Handler, serving, write_rows
from test_rounds import some_rows

from tokenclean_ray import sampling
from tokenclean_ray.errors import UserError
from tokenclean_ray.estimate import QUANTITIES, totals
from tokenclean_ray.input_files import list_files
from tokenclean_ray.sampling import sample_files
from tokenclean_ray.schema import RowError


@pytest.fixture
def files(tmp_path):
    """The same rows as every kind of file."""
    noise = np.random.default_rng(1)  # that a compressor leaves large: Arrow reads 64 kB of a compressed file at a time
    rows = [row | {"noise": noise.bytes(500).hex()} for row in some_rows(900)]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=300)
    return {name: list_files([str(tmp_path / name)]) for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet")}, rows


def number_of_rows(sample):
    """As the sample says: by bytes of the files, and in each place as many a byte as its chunk has."""
    places = sum(chunk.places for chunk in sample.chunks)
    return sample.total * sum(c.places * len(c.rows) / c.bytes for c in sample.chunks) / places


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.jsonl.gz", "d.parquet"])
def test_a_small_file_is_its_own_sample(files, monkeypatch, name):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 21)
    sample = sample_files(files[0][name], 0)
    assert sample.complete
    assert sample.rows == files[1]


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.jsonl.gz", "d.parquet"])
def test_a_large_file_is_read_in_part(files, monkeypatch, name):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(sampling, "STREAM_BYTES", 1 << 18)
    monkeypatch.setattr(sampling, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(sampling, "PARQUET_ROWS", 8)
    sample = sample_files(files[0][name], 0)
    assert not sample.complete
    assert 0 < len(sample.rows) < 900
    assert all(row in files[1] for row in sample.rows)
    assert number_of_rows(sample) == pytest.approx(900, rel=0.1)
    assert sample_files(files[0][name], 0) == sample
    if name in ("a.jsonl", "d.parquet"):
        assert sample_files(files[0][name], 1) != sample


def test_files_of_a_few_rows_are_read_whole(tmp_path, monkeypatch):
    """A place within one's last row would find nothing, and one within its first only the others."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    rows = some_rows(2000)
    for n in range(1000):
        write_rows(tmp_path / f"{n:04}.jsonl", rows[2 * n : 2 * n + 2])
    sample = sample_files(list_files([str(tmp_path)]), 0)
    assert not sample.complete
    found = [rows.index(row) % 2 for row in sample.rows]
    assert sum(found) == len(found) / 2 > 10
    assert number_of_rows(sample) == pytest.approx(2000, rel=0.1)


def test_rows_longer_than_a_chunk_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    rows = [row | {"noise": "x" * 980} for row in some_rows(120)]
    sample = sample_files(list_files([write_rows(tmp_path / "long.jsonl", rows)]), 0)
    found = [rows.index(row) for row in sample.rows]
    assert found == sorted(set(found))
    assert not sample.complete
    write_rows(tmp_path / "one.jsonl", [some_rows(1)[0] | {"noise": "x" * (1 << 18)}])
    with pytest.raises(UserError, match="rows are too long to be sampled"):
        sample_files(list_files([str(tmp_path / "one.jsonl")]), 0)


def test_a_row_as_long_as_many_shares_is_read_once(tmp_path, monkeypatch):
    """It was read to its end again from each of the places within."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    rows = some_rows(1000)
    rows[500] |= {"noise": "x" * 300_000}
    path = tmp_path / "giant.jsonl"
    write_rows(path, rows)
    lines_within, read = sampling._lines_within, []

    def counted(raw, start, stop):
        block, begin = lines_within(raw, start, stop)
        read.append(begin + len(block) - start)
        return block, begin

    monkeypatch.setattr(sampling, "_lines_within", counted)
    assert not sample_files(list_files([str(path)]), 0).complete
    assert 300_000 < sum(read) <= path.stat().st_size


def test_a_large_file_of_blank_lines_has_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    (tmp_path / "blank.jsonl").write_bytes(b"\n" * (1 << 18))
    with pytest.raises(UserError, match="lines are blank"):
        sample_files(list_files([str(tmp_path / "blank.jsonl")]), 0)


@pytest.mark.parametrize("long", [500, 10_000])
def test_a_sample_is_without_favour(tmp_path, monkeypatch, long):
    """Long rows, also longer than a chunk, beside short ones: over many seeds the mean estimate of the rows is their
    number, and the error holds the truth about as often as it says."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(sampling, "NUM_CHUNKS", 48)
    rng = np.random.default_rng(0)
    rows = [{"n": n, "text": "x" * int(rng.choice([5, 50, long], p=[0.48, 0.48, 0.04]))} for n in range(4000)]
    files = list_files([write_rows(tmp_path / "a.jsonl", rows)])
    found, right = [], []
    for seed in range(60):
        sample = sample_files(files, seed)
        assert not sample.complete
        total = totals(sample, [np.full(len(QUANTITIES), len(chunk.rows)) for chunk in sample.chunks])["rows"]
        found.append(total.value)
        right.append(abs(total.value - len(rows)) <= total.error)
    assert np.mean(found) == pytest.approx(len(rows), abs=4 * np.std(found) / 60**0.5, rel=0)
    assert np.mean(right) > 0.85


def test_rows_of_a_file_count_alike_wherever_they_stand(tmp_path, monkeypatch):
    """Also those of a file's first chunk, which fewer stretches within the file would hold."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    for n in range(60):
        write_rows(tmp_path / f"{n:04}.jsonl", [{"first": place < 20, "text": "x" * 40} for place in range(40)])
    files, firsts = list_files([str(tmp_path)]), []
    for seed in range(60):
        sample = sample_files(files, seed)
        weights = [(chunk.places / chunk.bytes, chunk.rows) for chunk in sample.chunks]
        of_first = sum(weight * sum(row["first"] for row in rows) for weight, rows in weights)
        firsts.append(of_first / sum(weight * len(rows) for weight, rows in weights))
    assert np.mean(firsts) == pytest.approx(0.5, abs=4 * np.std(firsts) / 60**0.5)


def test_where_few_rows_begin_longer_stretches_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 7)
    rows = [row | {"noise": "x" * 5000} for row in some_rows(200)]
    sample = sample_files(list_files([write_rows(tmp_path / "long.jsonl", rows)]), 0)
    assert not sample.complete
    assert len(sample.rows) > sampling.FEW_ROWS
    assert number_of_rows(sample) == pytest.approx(200, rel=0.02)


def test_files_of_other_kinds_and_rows_count_by_their_bytes(tmp_path, monkeypatch):
    """Chunks of a Parquet file of long rows are larger than those of short ones, and of a stream larger still."""
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(sampling, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(sampling, "STREAM_BYTES", 1 << 17)
    monkeypatch.setattr(sampling, "PARQUET_ROWS", 16)
    noise = np.random.default_rng(0)
    for name, count, size in (("long", 300, 1000), ("short", 4000, 60)):
        table = pa.table({"text": [noise.bytes(size).hex() for _ in range(count)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression=None, use_dictionary=False)
    lines = b"".join(b'{"text": "%s"}\n' % noise.bytes(100).hex().encode() for _ in range(2000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    found, right = [], []
    for seed in range(60):
        sample = sample_files(list_files([str(tmp_path)]), seed)
        assert not sample.complete
        rows = totals(sample, [np.full(len(QUANTITIES), len(chunk.rows)) for chunk in sample.chunks])["rows"]
        assert rows.value == pytest.approx(number_of_rows(sample))
        found.append(rows.value)
        right.append(abs(rows.value - 8300) <= rows.error)
    assert np.mean(found) == pytest.approx(8300, rel=0.03)  # where a stream was left is known to a buffer
    assert np.mean(right) > 0.9


def test_empty_files_beside_a_large_one(tmp_path, monkeypatch):
    """As Spark leaves them."""
    monkeypatch.setattr(sampling, "PARQUET_ROWS", 8)
    table = pa.table({"text": [np.random.default_rng(n).bytes(3000).hex() for n in range(400)]})
    pq.write_table(table, tmp_path / "full.parquet")
    for n in range(60):
        pq.write_table(table.slice(0, 0).replace_schema_metadata({"x": "y" * 4000}), tmp_path / f"empty-{n}.parquet")
    files = list_files([str(tmp_path)])
    assert all(sample_files(files, seed).rows for seed in range(10))


def test_many_small_files_of_a_store(tmp_path, bucket, monkeypatch):
    """They are read side by side, and none is looked for among the names of all others."""
    for n in range(60):
        write_rows(tmp_path / f"{n:04}.jsonl", some_rows(4, seed=n))
    fsspec.filesystem("s3").put(str(tmp_path), f"{bucket}/in", recursive=True)
    calls, looks = Counter(), []
    call, look = s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem._ls_from_cache

    async def noted(fs, how, *arguments, **options):
        calls["now"] += 1
        calls["most"] = max(calls["most"], calls["now"])
        await asyncio.sleep(0.01)
        calls["now"] -= 1
        return await call(fs, how, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    monkeypatch.setattr(s3fs.S3FileSystem, "_ls_from_cache", lambda fs, path: looks.append(path) or look(fs, path))
    files = list_files([f"{bucket}/in"])
    assert sample_files(files, 0) == sample_files(list_files([str(tmp_path)]), 0)
    assert calls["most"] > 1
    looks.clear()
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(sampling, "NUM_CHUNKS", 4)
    assert not sample_files(files, 0).complete
    assert len(looks) <= 8


def test_files_of_a_web_server_that_lists_none():
    rows = b'{"n": 1}\n' * 3

    class Web(Handler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            self.answer(*((rows, 200) if self.path.endswith(".jsonl") else (b"", 404)))

    with serving(Web) as address:
        sample = sample_files(list_files([f"http://{address}/{name}.jsonl" for name in "ab"]), 0)
    assert sample.rows == [{"n": 1}] * 6
    assert sample.total == 2 * len(rows)


def test_bad_rows_are_rows_and_bad_files_are_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnot json\n\n[1]\n')
    rows = sample_files(list_files([str(tmp_path / "a.jsonl")]), 0).rows
    assert rows[0] == {"a": 1}
    assert [type(row) for row in rows[1:]] == [RowError, RowError]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"b\.parquet cannot be read"):
        sample_files(list_files([str(tmp_path / "b.parquet")]), 0)
    (tmp_path / "gzip.jsonl").write_bytes(gzip.compress(b'{"a": 1}\n'))
    with pytest.raises(UserError, match=r"it is gzip: let its name end in \.gz"):
        sample_files(list_files([str(tmp_path / "gzip.jsonl")]), 0)
    column = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    fine, bad = sample_files(list_files([str(tmp_path / "d.parquet")]), 0).rows
    assert (fine, bad.reason) == ({"text": "a"}, "not UTF-8")
    for name, text in (("c.jsonl", ""), ("e.jsonl", " \n\n"), ("f.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="hold no rows"):
            sample_files(list_files([str(tmp_path / name)]), 0)
