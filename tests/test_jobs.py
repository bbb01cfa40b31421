"""Whole processes: the script of a job, an object store, a terminal."""

import gzip
import json
import os
import subprocess

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_job, write_rows
from test_cli import CONSOLE_SCRIPT
from test_rounds import config_for, some_rows

from tokenclean_ray import rounds


@pytest.mark.usefixtures("ray_session")
def test_the_job_script_runs_the_job_and_says_how_it_goes(tmp_path, model_pair):
    write_rows(tmp_path / "data.jsonl", some_rows(30))
    values = {
        "output": "run",
        "data": {"path": "*.jsonl"},
        "model": {"base": model_pair[0], "reference": model_pair[1]},
        "select": {"scorer": "excess_loss"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    done = run_job(tmp_path, "clean", "run.yaml", "select.keep_ratio=0.5")
    assert done.returncode == 0, done.stderr
    for stage in ("plan", "encode", "score", "mask"):
        assert any(line.startswith(stage) for line in done.stderr.splitlines()), done.stderr
    assert "rows 30 = masked 30 + nothing kept 0 + rejected 0" in done.stdout
    assert "masked dataset: " in done.stdout
    assert f"report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
    latest = json.loads((tmp_path / "run" / "masked" / "latest.json").read_text())
    assert latest["snapshot"] == "v0001"
    parts = list((tmp_path / "run" / "masked" / "v0001").glob("part-*.parquet"))
    assert parts
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=[str(p) for p in parts], split="train", cache_dir=str(tmp_path / "cache"))
    kept = sum(label != -100 for labels in rows["labels"] for label in labels)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept == record["threshold"]["k"]


def test_from_an_object_store_to_an_object_store(bucket, s3_server, tmp_path, model_pair):
    """The config alone says where the store is; the workers of a Ray of its own see the keys."""
    local = write_rows(tmp_path / "data.jsonl", some_rows(25))
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.put(local, f"{bucket}/in/data.jsonl")
    values = {
        "output": f"{bucket}/run",
        "endpoint_url": s3_server,
        "data": {"path": f"{bucket}/in", "part_bytes": 4096},
        "model": {"base": model_pair[0], "reference": model_pair[1]},
        "select": {"scorer": "excess_loss"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    environment = {k: v for k, v in os.environ.items() if k != "AWS_ENDPOINT_URL"} | {"RAY_ADDRESS": "local"}
    done = run_job(tmp_path, "clean", "run.yaml", "score.num_actors=1", env=environment)
    assert done.returncode == 0, done.stderr
    fs.invalidate_cache()
    published = fs.glob(f"{bucket}/run/masked/v0001/part-*.parquet")
    assert len(published) >= 2
    assert json.loads(fs.cat(f"{bucket}/run/masked/latest.json"))["snapshot"] == "v0001"
    assert fs.cat(f"{bucket}/run/report.html").startswith(b"<!doctype html>")
    export = [CONSOLE_SCRIPT, "export", f"{bucket}/run", "--to", "trl", "--out", "out"]
    subprocess.run(export, cwd=tmp_path, check=True, timeout=300)
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("*.parquet")) == 25


@pytest.mark.usefixtures("ray_session")
def test_inputs_of_several_kinds_in_one_run(tmp_path, model_pair):
    rows = some_rows(40)
    write_rows(tmp_path / "in" / "a.jsonl", rows[:10])
    (tmp_path / "in" / "b.json").write_text(json.dumps(rows[10:20]))
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[20:30])).encode()))
    pq.write_table(pa.Table.from_pylist(rows[30:]), tmp_path / "in" / "d.parquet", row_group_size=4)
    record = rounds.clean(config_for(tmp_path, model_pair, data={"path": str(tmp_path / "in")}))
    assert record["counts"]["masked"] + record["counts"]["nothing_kept"] == 40
