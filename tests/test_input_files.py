"""Paths, folders, globs and hub datasets → the same files everywhere, under the names that the user gave."""

import hashlib
import json
import os
import re
import urllib.parse
from pathlib import Path
from typing import ClassVar

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Handler, run_python, serving

from tokenclean_ray.errors import UserError
from tokenclean_ray.input_files import list_files
from tokenclean_ray.source import usable_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    here = tmp_path / "run [1]"  # no pattern of the user's
    for name in ("b.jsonl", "a.json.gz", "sub/c.parquet", "sub/d.jsonl.zst", "note.txt", ".e.jsonl", "_tmp/f.jsonl"):
        path = here / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(here)
    return here / "data"


def test_a_path_from_home_has_the_same_label_wherever_one_stands(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    found = list_files(["~/b.jsonl"])
    assert found == [(str(folder / "b.jsonl"),) * 2]
    monkeypatch.chdir(tmp_path)
    assert list_files(["~/b.jsonl"]) == found


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["data/b.jsonl"], ["data/b.jsonl"]),
        (["data"], ["data/a.json.gz", "data/b.jsonl", "data/sub/c.parquet", "data/sub/d.jsonl.zst"]),
        (["data/"], ["data/a.json.gz", "data/b.jsonl", "data/sub/c.parquet", "data/sub/d.jsonl.zst"]),
        (["data/_tmp"], ["data/_tmp/f.jsonl"]),
        (["data/[ab]*"], ["data/a.json.gz", "data/b.jsonl"]),
        (["data/?.j*"], ["data/a.json.gz", "data/b.jsonl"]),
        (["data/**/*.parquet"], ["data/sub/c.parquet"]),
        (["data/sub/d.jsonl.zst", "data/b.jsonl"], ["data/b.jsonl", "data/sub/d.jsonl.zst"]),
        (["data/b.jsonl", "data/?.jsonl", "./data/../data/b.jsonl"], ["data/b.jsonl"]),
    ],
)
def test_list_files(folder, paths, labels):
    files = list_files(paths)
    assert [label for _, label in files] == labels
    assert [url for url, _ in files] == [os.path.abspath(label) for label in labels]


def test_a_file_whose_name_looks_like_a_glob(folder):
    (folder / "b[1].jsonl").touch()
    assert [label for _, label in list_files(["data/b[1].jsonl"])] == ["data/b[1].jsonl"]


def test_linked_folders_are_looked_into(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g.jsonl").touch()
    (folder / "sub" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [label for _, label in list_files(["data/sub"])] == [
        *("data/sub/c.parquet", "data/sub/d.jsonl.zst", "data/sub/linked/g.jsonl"),
    ]


def test_what_datasets_writes_beside_rows_is_no_data(folder):
    for name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"):
        (folder / "sub" / name).write_text("{}")
    assert [label for _, label in list_files(["data/sub"])] == ["data/sub/c.parquet", "data/sub/d.jsonl.zst"]


def test_absolute_paths_keep_their_label(folder):
    path = str(folder / "b.jsonl")
    assert list_files([path]) == [(path, path)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/note.txt", "unknown kind of file; known are .jsonl"),
        ("data/b.json", "data.path data/b.json does not exist; did you mean b.jsonl?"),
        ("dota", "data.path dota does not exist; did you mean data?"),
        ("nowhere/b.jsonl", "data.path nowhere/b.jsonl does not exist"),
        ("data/*.csv", "matches no file that ends in .jsonl"),
        ("data/*.txt", "matches no file that ends in .jsonl"),
        ("tatsu-lab/alpaca", "data.path tatsu-lab/alpaca does not exist; on the hub? hf://datasets/tatsu-lab/alpaca"),
        ("nosuch://b/x.jsonl", "data.path nosuch://b/x.jsonl: Protocol not known: nosuch"),
    ],
)
def test_list_files_refuses(folder, path, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        list_files(["data", path], "data.path")
    assert message in str(caught.value)


def test_what_datasets_saved_is_shown_the_way_to_parquet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"question": "q", "answer": "a"}] * 3)
    datasets.DatasetDict(test=rows.take(1), train=rows).save_to_disk("sa'ved")
    rows.to_csv("rows.csv")
    for path in ("sa'ved", "sa'ved/train", "rows.csv", "*.csv"):
        with pytest.raises(UserError) as caught:
            list_files([path])
        command = re.search(r"in Python datasets\.(.*) writes one$", str(caught.value))
        eval(f"datasets.{command[1]}")  # as it would be pasted
        assert [label for _, label in list_files(["rows.parquet"])] == ["rows.parquet"]
        assert pq.read_table("rows.parquet").num_rows == 3
        Path("rows.parquet").unlink()


def test_the_way_to_parquet_names_an_object_store(bucket):
    for name in ("saved/train/data-0.arrow", "rows.csv"):
        fsspec.filesystem("s3").pipe_file(f"{bucket}/{name}", b"x")
    for path, named in (("saved", "load_from_disk('{}/saved/train')"), ("rows.csv", "from_csv('{}/rows.csv')")):
        with pytest.raises(UserError) as caught:
            list_files([f"{bucket}/{path}"])
        assert named.format(bucket) in str(caught.value)


class Hub(Handler):
    """What HfFileSystem asks of the hub, for one dataset of two files."""

    files: ClassVar = {
        "data/a.jsonl": b"".join(json.dumps({"n": n, "text": "x" * n}).encode() + b"\n" for n in range(300)),
        "README.md": b"a card",
    }
    ranges: ClassVar = []

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer([entry for entry in self.tree("") if entry["path"] in asked])

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if "/resolve/" in path:
            data = self.files[path.partition("/resolve/")[2].partition("/")[2]]
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                self.ranges.append(wanted[0])
                data = data[int(wanted[1]) : int(wanted[2]) + 1]
            return self.answer(data, 206 if wanted else 200)
        if "/tree/" in path:
            return self.answer(self.tree(path.partition("/tree/")[2].partition("/")[2]))
        return self.answer({"id": "owner/name", "sha": "0" * 40, "private": False, "siblings": []})

    def tree(self, folder):
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]
        entries.append({"type": "directory", "path": "data", "oid": "0" * 40})
        return [e for e in entries if not folder or e["path"].startswith(f"{folder}/")]

    def answer(self, value, status=200):
        super().answer(value, status, [("ETag", '"x"'), ("X-Repo-Commit", "0" * 40)])


READ = """
import json, sys
from tokenclean_ray.input_files import list_files
from tokenclean_ray.source import plan_file, read_parts
for url, label in list_files([sys.argv[1]]):
    parts = plan_file(url, label, 4096, "")
    rows = [row.value["n"] for _, rows in read_parts(parts, 4096) for row in rows]
    print(json.dumps([label, len(parts), rows]))
"""


@pytest.mark.parametrize("path", ["hf://datasets/owner/name", "hf://datasets/owner/name/data/*.jsonl"])
def test_datasets_of_the_hub_are_read_by_its_own_filesystem(path):
    """A process of its own, because the hub's address is read at import."""
    with serving(Hub) as address:
        said = run_python(READ, path, HF_ENDPOINT=f"http://{address}", HF_HUB_OFFLINE="0", HF_TOKEN="hf_x")
    label, parts, rows = json.loads(said)
    assert label == "hf://datasets/owner/name/data/a.jsonl"
    assert parts > 5
    assert rows == list(range(300))
    assert Hub.ranges


def test_a_name_that_is_no_utf_8_has_a_label_that_can_be_written(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
    with open(name, "wb") as file:
        file.write(b'{"a": 1}\n')
    ((url, label),) = list_files([str(tmp_path)])
    assert os.fsencode(url) == name
    assert label.endswith("caf\\xe9.jsonl")
    assert pa.array([label], pa.string()).to_pylist() == [label]
    assert list(usable_rows(str(tmp_path))) == [{"a": 1}]
