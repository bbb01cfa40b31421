"""Files of a run appear complete or not at all, carry their summary, and are refused when damaged."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Damaged, Store, run_folder

TABLE = pa.table({"row": pa.array(range(300), pa.int32()), "input_ids": [[n, n + 1] for n in range(300)]})
SIZE = 8 << 20
WRITER = f"""
import itertools, sys
from tokenclean_ray.layout import Damaged, Store, run_folder
store = Store(sys.argv[1])
for number in itertools.count(1):
    store.write_bytes("folder/part-a.parquet", bytes([number % 256]) * {SIZE})
    print(number, flush=True)
"""


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    root = {"local": str(tmp_path), "memory": "memory://"}.get(request.param) or request.getfixturevalue("bucket")
    return Store(f"{root}/{uuid.uuid4().hex}")


def put(store, path: str, data: bytes) -> None:
    """Write behind the store's back, as another process does."""
    protocol = store.url.partition("://")[0] if "://" in store.url else "file"
    fs = fsspec.filesystem(protocol, skip_instance_cache=True)
    fs.makedirs(f"{store.url}/{path}".rpartition("/")[0], exist_ok=True)
    fs.pipe_file(f"{store.url}/{path}", data)


def get(store, path: str) -> bytes:
    with fsspec.open(f"{store.url}/{path}", "rb") as file:
        return file.read()


def test_part_and_its_summary(store):
    store.write_part("encoded", "part-a", TABLE, {"rows": 300, "rejected": {"no é": 2}})
    assert store.read_part("encoded", "part-a").equals(TABLE)
    assert store.read_part("encoded", "part-a", ["row"]).column_names == ["row"]
    assert store.read_summary("encoded", "part-a") == {"part": "part-a", "rows": 300, "rejected": {"no é": 2}}


def test_a_part_is_the_same_bytes_whoever_writes_it(store):
    store.write_part("encoded", "part-a", TABLE, {"rows": 300})
    first = get(store, "encoded/part-a.parquet")
    store.write_part("encoded", "part-a", TABLE.replace_schema_metadata({"by": "another"}), {"rows": 300})
    assert get(store, "encoded/part-a.parquet") == first


def test_a_part_without_rows_stops_no_loader(tmp_path):
    """`datasets` reads as many rows at a time as the first row group has."""
    store, kind = Store(str(tmp_path)), pa.schema({"row": pa.int32(), "labels": pa.list_(pa.int32())})
    store.write_part("masked", "part-a", kind.empty_table(), {"rows": 0})
    store.write_part("masked", "part-b", pa.Table.from_pylist([{"row": 4, "labels": [1, 2]}], kind), {"rows": 1})
    assert store.read_part("masked", "part-a").num_rows == 0
    assert store.read_summary("masked", "part-a")["rows"] == 0
    files = sorted(map(str, tmp_path.glob("masked/*.parquet")))
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert [(row["row"], row["labels"]) for row in rows] == [(4, [1, 2])]


def test_part_names_are_the_finished_parts(store):
    assert store.part_names("losses/base") == set()
    store.write_part("losses/base", "part-a", TABLE, {})
    assert store.part_names("losses/base") == {"part-a"}
    store.write_json("losses/base/manifest.json", {})
    put(store, f"losses/base/.{uuid.uuid4().hex}.tmp", b"PAR1")
    put(store, "losses/base/.part-b.parquet", b"PAR1")
    assert store.part_names("losses/base") == {"part-a"}
    put(store, "losses/base/part-c.parquet", b"PAR1")  # another process's, after this one listed the folder
    assert store.part_names("losses/base") == {"part-a", "part-c"}


def test_names_of_files_and_folders(store):
    assert store.names("masked") == []
    for path in ("masked/v0002/x.json", "masked/v0001/x.json", "masked/latest.json"):
        store.write_json(path, {})
    assert store.names("masked") == ["latest.json", "v0001", "v0002"]


def test_json(store):
    assert store.read_json("run.json") is None
    store.write_json("run.json", {"a": [1, None, "é"]})
    assert store.read_json("run.json") == {"a": [1, None, "é"]}
    assert "é".encode() in get(store, "run.json")
    store.write_json("run.json", {"a": 2})
    assert store.read_json("run.json") == {"a": 2}


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff"])
def test_damaged_json_is_named(store, content):
    put(store, "run.json", content)
    with pytest.raises(UserError, match=r"run\.json is damaged \(not valid JSON\): delete it") as caught:
        store.read_json("run.json")
    assert store.url in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda d: b"", lambda d: d[:100], lambda d: d[: len(d) // 2], lambda d: d[:-1], lambda d: b"x" * len(d)],
    ids=["empty", "start", "half", "last byte", "other"],
)
def test_damaged_part_is_named(store, damage):
    store.write_part("encoded", "part-a", TABLE, {"rows": 300})
    put(store, "encoded/part-a.parquet", damage(get(store, "encoded/part-a.parquet")))
    for read in (store.read_part, store.read_summary):
        with pytest.raises(UserError) as caught:
            read("encoded", "part-a")
        assert f"{store.url}/encoded/part-a.parquet is damaged" in str(caught.value)
        assert "delete it and run the same command again" in str(caught.value)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), TimeoutError("read timed out"), PermissionError("SlowDown")]
)
def test_a_failing_store_is_not_a_damaged_file(tmp_path, monkeypatch, error):
    """Else a repair would delete good files whenever the store has a bad minute."""
    store = Store(str(tmp_path))
    store.write_part("encoded", "part-a", TABLE, {})
    data = (tmp_path / "encoded" / "part-a.parquet").read_bytes()

    class Failing(io.BytesIO):
        def read(self, *_):
            raise error

    monkeypatch.setattr(Store, "_open_part", lambda *_: Failing(data))
    for read in (store.read_part, store.read_summary):
        with pytest.raises(type(error), match=str(error.args[-1])):
            read("encoded", "part-a")


def test_state_is_read_back_as_it_was_written_and_records_without_secrets(store, monkeypatch):
    """A source may be named like a secret's parameter; what resumes a run must not change."""
    monkeypatch.setenv("ODD_TOKEN", "12345678")
    value = {"sources": {"https://h/x?token=abcé": 1}, "n": 12345678}
    store.write_json("threshold.json", value)
    assert store.read_json("threshold.json") == value
    store.write_record("run.json", value)
    assert store.read_json("run.json") == {"sources": {"https://h/x?token=***": 1}, "n": 12345678}


def test_swapped_parts_are_named(store):
    store.write_part("encoded", "part-a", TABLE, {})
    put(store, "encoded/part-b.parquet", get(store, "encoded/part-a.parquet"))
    for read in (store.read_part, store.read_summary):
        with pytest.raises(UserError, match=r"encoded/part-b\.parquet is damaged \(it belongs to another part\)"):
            read("encoded", "part-b")


def test_a_part_of_another_folder_is_named(store):
    store.write_part("losses/one", "part-a", TABLE, {})
    put(store, "losses/two/part-a.parquet", get(store, "losses/one/part-a.parquet"))
    with pytest.raises(Damaged, match=r"two/part-a\.parquet is damaged \(it belongs to another folder\)") as caught:
        store.read_part("losses/two", "part-a")
    assert list(caught.value.files) == ["losses/two/part-a.parquet"]


def test_a_summary_is_what_was_written_or_refused(tmp_path):
    """Parquet checks its pages; the summary has a checksum of its own."""
    store = Store(str(tmp_path))
    store.write_part("encoded", "part-a", TABLE.slice(0, 20), {"rows": 20})
    path = tmp_path / "encoded" / "part-a.parquet"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(Damaged):
            assert store.read_summary("encoded", "part-a") == {"part": "part-a", "rows": 20}


def test_foreign_parquet_is_named(tmp_path):
    (tmp_path / "encoded").mkdir()
    pq.write_table(TABLE, tmp_path / "encoded" / "part-a.parquet")
    with pytest.raises(UserError, match=r"part-a\.parquet is damaged \(it belongs to another part\)"):
        Store(str(tmp_path)).read_part("encoded", "part-a")


def test_no_flipped_byte_escapes_as_another_error(tmp_path):
    """Any byte of footer and pages may be wrong: the file is refused by name or its summary is whole."""
    store = Store(str(tmp_path))
    store.write_part("encoded", "part-a", TABLE.slice(0, 20), {"rows": 20})
    path = tmp_path / "encoded" / "part-a.parquet"
    whole = path.read_bytes()
    refusals = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            store.read_part("encoded", "part-a")
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > len(whole) / 2
    assert all(str(path) in refusal for refusal in refusals)


def complete(path) -> int:
    """The byte that the whole file repeats."""
    data = path.read_bytes()
    assert len(data) == SIZE
    assert data == data[:1] * SIZE
    return data[0]


def test_writes_are_atomic_under_kill(tmp_path):
    path = tmp_path / "folder" / "part-a.parquet"
    seen = set()
    for round_ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline()
        until = time.monotonic() + 0.2 + 0.013 * round_
        while time.monotonic() < until or (len(seen) < 2 and writer.poll() is None):
            seen.add(complete(path))  # beside a writer at work
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        complete(path)
    assert len(seen) > 1
    assert Store(str(tmp_path)).part_names("folder") == {"part-a"}  # whatever temporaries the kills left


def test_a_failed_write_leaves_nothing(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("folder/a", b"1")
    (tmp_path / "folder" / "b").mkdir()
    with pytest.raises(OSError, match="b"):  # no file replaces a folder
        store.write_bytes("folder/b", b"2")
    assert sorted(os.listdir(tmp_path / "folder")) == ["a", "b"]
    assert (tmp_path / "folder" / "a").read_bytes() == b"1"


def test_a_job_keeps_nothing_in_the_copy_of_its_working_dir(tmp_path, monkeypatch):
    for name in ("mine", "working_dir_files/_ray_pkg_1"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert run_folder("runs/x") == str(tmp_path / "mine" / "runs" / "x")
    monkeypatch.chdir(tmp_path / "working_dir_files" / "_ray_pkg_1")
    with pytest.raises(UserError, match="give an absolute path that all nodes share"):
        run_folder("runs/x")
    assert run_folder("/shared/runs/") == "/shared/runs"
    assert run_folder("s3://bucket/runs") == "s3://bucket/runs"


@pytest.mark.parametrize("folder", ["", "data"])
def test_checksums_tell_which_files_were_written_again(store, folder):
    names = ["b.parquet", "a.parquet", "state.json"]
    for name in names:
        put(store, f"{folder}/{name}".lstrip("/"), b"one")
    before = store.checksums(folder, names)
    assert store.checksums(folder, names) == before
    put(store, f"{folder}/a.parquet".lstrip("/"), b"two")
    changed = [one != other for one, other in zip(before, store.checksums(folder, names), strict=True)]
    assert changed == [False, True, False]


def test_checksums_of_an_object_store_take_one_listing(bucket, asked):
    store = Store(f"{bucket}/data")
    names = [f"{n}.parquet" for n in range(30)]
    for name in names:
        store.write_bytes(name, name.encode())
    asked.clear()
    assert len(set(store.checksums("", names))) == 30
    assert asked == ["list_objects_v2"]


def test_parts_of_an_object_store_are_worked_on_side_by_side(tmp_path, bucket):
    assert Store(str(tmp_path)).at_once == 1
    assert Store(f"{bucket}/run").at_once > 1


def test_a_part_of_an_object_store_is_read_by_one_request(bucket, asked, monkeypatch):
    store = Store(f"{bucket}/run")
    table = pa.table({"row": list(range(50_000)), "text": [str(n) * 9 for n in range(50_000)]})
    store.write_part("encoded", "part-1", table, {"rows": 3})
    store.write_part("encoded", "part-2", table, {"long": "x" * 200_000})
    asked.clear()
    assert store.read_summary("encoded", "part-1") == {"part": "part-1", "rows": 3}
    assert store.read_part("encoded", "part-1", ["row"])["row"].to_pylist() == list(range(50_000))
    assert [store.has_part("encoded", part) for part in ("part-1", "part-0")] == [True, False]
    assert asked == ["get_object"] * 4
    assert len(store.read_summary("encoded", "part-2")["long"]) == 200_000
    store.write_bytes("encoded/part-3.parquet", b"")
    for read in (store.read_part, store.read_summary):
        with pytest.raises(Damaged):
            read("encoded", "part-3")
        with pytest.raises(FileNotFoundError):
            read("encoded", "part-4")

    def refused(*_, **__):
        raise OSError(errno.EINVAL, "the provided token must be refreshed")

    monkeypatch.setattr(fsspec.core.url_to_fs(bucket)[0], "cat_file", refused)
    for read in (store.read_part, store.read_summary):
        with pytest.raises(OSError, match="must be refreshed") as caught:
            read("encoded", "part-1")
        assert not isinstance(caught.value, Damaged)
