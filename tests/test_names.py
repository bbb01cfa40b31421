"""Whatever decides a result is in its name, so that none is taken for another; what decides nothing is not."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import chat, make_llama, save, write_rows

from tokenclean_ray import calibrate, pipeline, rounds, settle
from tokenclean_ray.calibrate import copies_suffix
from tokenclean_ray.config import Calibrate, Select
from tokenclean_ray.config_file import build_config
from tokenclean_ray.layout import Store
from tokenclean_ray.models import describe, vocabulary_fingerprint
from tokenclean_ray.parts import Splits
from tokenclean_ray.plant import KINDS
from tokenclean_ray.rounds import _training_files
from tokenclean_ray.run import encode, losses_folder, open_run
from tokenclean_ray.selection import DIGIT_BITS
from tokenclean_ray.train import job_for


def test_a_training_is_named_after_start_rows_seed_and_format(tmp_path):
    one, other = (describe(save(tmp_path / str(n), make_llama(n))) for n in (0, 1))

    def name(start=one, rows="rows", **more):
        config = build_config({"output": "o", "train": {"data": "d", "model": "m"}} | more, "train")
        return job_for(Store("x"), "trained", [], rows, start, config, one).name

    assert name() == name(data={"template": "chat", "max_length": 64})
    names = [name(), name(other), name(rows="others"), name(seed=1), name(data={"template": "tulu"})]
    assert len(set(names)) == len(names)


def identity_of(folder, start=None, tokenizer=None):
    files, identity, _ = _training_files(str(folder), start, tokenizer)
    assert [Path(file).name for file in files] == ["a.parquet"]
    return identity


def test_a_folder_to_train_on_is_another_where_a_file_was_written_again(tmp_path):
    file = tmp_path / "data" / "a.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"input_ids": [[1, 2]], "labels": [[-100, 2]]}), file)
    os.utime(file, (1, 1))
    before, size = identity_of(file.parent), file.stat().st_size
    file.chmod(0o640)
    os.link(file, tmp_path / "link")
    assert identity_of(file.parent) == before
    pq.write_table(pa.table({"input_ids": [[1, 3]], "labels": [[-100, 3]]}), file)
    assert file.stat().st_size == size
    assert identity_of(file.parent) != before


def test_a_run_to_train_on_is_another_where_another_selection_was_published(tmp_path, model_pair, tokenizer):
    store, start = Store(str(tmp_path)), describe(model_pair[0])
    store.write_bytes("masked/v0001/a.parquet", b"")
    store.write_json("masked/latest.json", {"snapshot": "v0001"})
    found = []
    for selection in ("one", "other"):
        manifest = {"selection": selection, "parts": ["a"], "tokenizer": vocabulary_fingerprint(tokenizer)}
        store.write_json("masked/v0001/manifest.json", manifest)
        found.append(identity_of(tmp_path, start, tokenizer))
    assert found[0] != found[1]


@pytest.mark.parametrize("known", [{}, {"template": "tulu"}])
def test_the_template_of_rows_is_the_config_s_where_no_manifest_tells_it(
    tmp_path, model_pair, tokenizer, monkeypatch, known
):
    store, jobs = Store(str(tmp_path / "run")), []
    store.write_bytes("masked/v0001/a.parquet", b"")
    store.write_json("masked/latest.json", {"snapshot": "v0001"})
    manifest = {"selection": "one", "parts": ["a"], "tokenizer": vocabulary_fingerprint(tokenizer)}
    store.write_json("masked/v0001/manifest.json", manifest | known)
    monkeypatch.setattr(rounds.workers, "connect", lambda *_: None)
    monkeypatch.setattr(rounds.metrics, "follow", lambda *_: None)
    monkeypatch.setattr(rounds, "fine_tune", lambda job: jobs.append(job) or {})
    values = {"output": str(tmp_path / "out"), "model": {"base": model_pair[0]}, "train": {"data": store.url}}
    rounds.train(build_config(values, "train"))
    assert jobs[0].config.data.template == known.get("template", "chat")


def test_a_calibration_of_an_older_version_is_not_taken_for_one_of_this(tmp_path, monkeypatch):
    """Of versions before methods had a number the limits were too low."""
    counts = dict.fromkeys([("pool", 0), (KINDS[0], 0), ("genuine", 0)], np.ones(1 << DIGIT_BITS, np.int64))
    made = []
    monkeypatch.setattr(pipeline, "count_scores", lambda *_: made.append(1) or {"": counts})
    of_part, select = {"rows": 1, "response_tokens": 1}, Select(scorer="base_loss", calibrate=Calibrate())
    copies = {"a" + copies_suffix(select.calibrate): of_part | {"planted": 1}}
    for method, times in ((calibrate.METHOD, 1), (calibrate.METHOD, 1), (calibrate.METHOD + 1, 2)):
        monkeypatch.setattr(calibrate, "METHOD", method)
        run = SimpleNamespace(store=Store(str(tmp_path)))
        settle._calibration(run, select, {"a": of_part}, copies, {"base": "losses/base"})
        assert len(made) == times


@pytest.mark.usefixtures("ray_session")
def test_what_decides_tokens_columns_and_losses_is_in_their_names(tmp_path, model_pair):
    path = write_rows(tmp_path / "pool.jsonl", [chat("the fox", "the dog") | {"kind": "a"}])

    def names(dtype="float32", **data):
        values = {"output": str(tmp_path / "run"), "data": {"path": path} | data}
        values["model"] = {"base": model_pair[0], "reference": model_pair[1], "dtype": dtype}
        with open_run(build_config(values), "clean") as run:
            return *encode(run, run.config.data.path, Splits()), losses_folder(run, Select(), "base", run.base)

    part, losses = names()
    others = [
        names(**{key: value})
        for key, value in {
            "format": "messages",
            "columns": {"source": "kind"},
            "turn_keys": {"name": None},
            "extra_columns": ["kind"],
            "max_length": 64,
            "on_overflow": "reject",
        }.items()
    ]
    assert len({part, *(other for other, _ in others)}) == 7
    assert {of for _, of in others} == {losses}
    assert names(max_rejected=0.5) == (part, losses)
    same, in_halves = names(dtype="bfloat16")
    assert same == part
    assert in_halves != losses
