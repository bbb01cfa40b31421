"""Exports: each format by its trainer's own loader where that installs here, else by its documented columns."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Handler, serving
from datasets import load_dataset, load_from_disk
from test_cli import CONSOLE_SCRIPT
from test_rounds import config_for, kept_set, masked_rows, some_rows
from transformers import AutoModelForCausalLM

from tokenclean_ray import cli, rounds
from tokenclean_ray import export as export_module
from tokenclean_ray.errors import UserError
from tokenclean_ray.export import FORMATS, MARK, export
from tokenclean_ray.export_card import card
from tokenclean_ray.finished import open_finished
from tokenclean_ray.layout import Store

pytestmark = pytest.mark.usefixtures("ray_session")
COLUMNS = {
    "trl": ["input_ids", "labels"],
    "axolotl": ["attention_mask", "input_ids", "labels"],
    "llamafactory": ["attention_mask", "input_ids", "labels"],
    "skyrl": ["input_ids", "loss_mask"],
    "verl": ["attention_mask", "input_ids", "loss_mask", "position_ids"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_pair):
    rows = [row | {"source": "s|<b>\n"} if row["id"] % 7 == 0 else row for row in some_rows(60)]
    config = config_for(tmp_path_factory.mktemp("export"), model_pair, rows)
    return config.output, rounds.clean(config)


def load(to, out, cache):
    if to == "llamafactory":
        return load_from_disk(out)
    if to == "hf":
        return load_dataset(out, split="train", cache_dir=str(cache))
    return load_dataset("parquet", data_files=f"{out}/*.parquet", split="train", cache_dir=str(cache))


@pytest.mark.parametrize("to", FORMATS)
def test_every_row_arrives_with_its_mask_token_aligned(run, tmp_path, to, monkeypatch):
    out = str(tmp_path / "out")
    monkeypatch.setattr(export_module, "PARTS_A_FILE", 2)
    snippet = export(run[0], to, out)
    assert out in snippet
    parts = len(Store(run[0]).part_names("masked/v0001"))
    assert parts > 2
    assert len([*Path(out).rglob("*.parquet"), *Path(out).rglob("*.arrow")]) == -(-parts // 2)
    rows = load(to, out, tmp_path / "cache")
    expected = sorted((r["input_ids"], r["labels"]) for r in masked_rows(run[1]).values())
    found = []
    for row in rows:
        ids = row["input_ids"]
        if "loss_mask" in row:
            assert set(row["loss_mask"]) <= {0, 1}
            row["labels"] = [t if keep else -100 for t, keep in zip(ids, row["loss_mask"], strict=True)]
        assert row.get("attention_mask", [1] * len(ids)) == [1] * len(ids)
        assert row.get("position_ids", list(range(len(ids)))) == list(range(len(ids)))
        assert any(label != -100 for label in row["labels"])
        found.append((ids, row["labels"]))
    assert sorted(found) == expected
    assert sum(label != -100 for _, labels in found for label in labels) == len(kept_set(run[1]))
    if to != "hf":
        assert sorted(rows.column_names) == COLUMNS[to]


@pytest.mark.parametrize("to", FORMATS)
def test_a_part_in_which_nothing_is_kept_stops_no_loader(run, tmp_path, to):
    """As versions before wrote it: a row group of no rows, the first of all."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    first = folder / "masked/v0001" / f"{open_finished(str(folder)).manifest['parts'][0]}.parquet"
    rows = pq.read_table(first)
    pq.write_table(rows.slice(0, 0), first, write_page_checksum=True)
    export(str(folder), to, str(tmp_path / "out"))
    found = load(to, str(tmp_path / "out"), tmp_path / "cache")
    assert len(found) == run[1]["counts"]["masked"] - rows.num_rows > 0


@pytest.mark.parametrize("listed", [False, True])
def test_verl_s_dataset_class_reads_what_it_is_given(run, tmp_path, monkeypatch, listed):
    """A pattern as one text, as the command gives it, or a list of files."""
    out = str(tmp_path / "out")
    names: dict = {}
    exec(export(run[0], "verl", out), names)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = sorted(map(str, Path(out).glob("*.parquet"))) if listed else f"{out}/*.parquet"
    rows = names["Pretokenized"](files, tokenizer=None, config=None)
    assert len(rows) == run[1]["counts"]["masked"]
    assert set(rows[0]) == set(COLUMNS["verl"])


def test_hf_keeps_the_columns_and_explains_itself(run, tmp_path):
    out = tmp_path / "out"
    export(run[0], "hf", str(out), license="apache-2.0")
    rows = load("hf", str(out), tmp_path / "cache")
    assert {"id", "source", "row", "input_ids", "labels"} == set(rows.column_names)
    assert {r["id"]: r["labels"] for r in rows} == {r["id"]: r["labels"] for r in masked_rows(run[1]).values()}
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    record = run[1]
    for figure in (f"{record['threshold']['score']:.6g}", f"{len(kept_set(record)):,}", "keep ratio | 0.6",
                   record["models"]["base"]["fingerprint"]):  # fmt: skip
        assert figure in text
    assert "| s\\|&lt;b> |" in text  # a source that would like to be markup


def test_the_card_s_counts_are_those_of_the_run(run, tmp_path):
    """Figures by hand, all different, in place of the run's own."""
    finished = open_finished(run[0])
    counts = {"rows": 12345, "masked": 12000, "nothing_kept": 300, "rejected": 45}
    sources = {"a": {"tokens": 40000, "kept": 10000}, "b": {"tokens": 10000, "kept": 7000}}
    chosen = replace(finished.selections[0], threshold=finished.selections[0].threshold | {"sources": sources})
    text = card(replace(finished, record=finished.record | {"counts": counts}, selections=[chosen]), "mit")
    for row in (
        "rows in | 12,345", "rows here | 12,000", "rows with nothing kept, left out | 300", "rows rejected | 45",
        "answer tokens | 50,000", "answer tokens kept | 17,000", "a | 40,000 | 10,000 | 25.0%",
        "b | 10,000 | 7,000 | 70.0%",
    ):  # fmt: skip
        assert f"\n| {row} |\n" in text


@pytest.mark.parametrize(("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**9, "n>1B")])
def test_the_card_s_size_is_the_hub_s_name_for_it(run, rows, size):
    finished = open_finished(run[0])
    counts = finished.record["counts"] | {"masked": rows}
    head = card(replace(finished, record=finished.record | {"counts": counts}), "mit").split("---\n")[1]
    assert yaml.safe_load(head)["size_categories"] == [size]


def test_the_card_says_nothing_of_this_machine_s_folders(run):
    models = open_finished(run[0]).record["models"]
    text = card(open_finished(run[0]), "mit")
    for role in ("base", "reference"):
        assert f"| {role} model | {role} ({models[role]['fingerprint']}) |" in text
        assert str(Path(models[role]["path"]).parent) not in text
    assert str(Path(run[0]).parent) not in text


@pytest.mark.parametrize(
    ("to", "base", "longest"),
    [
        ("trl", 'SFTTrainer("{}"', "max_length=2048"),
        ("axolotl", "base_model: {}\n", "sequence_len: 2048"),
        ("llamafactory", "model_name_or_path: {}\n", "cutoff_len: 2048"),
        ("skyrl", "", "max_length: 2048"),
        ("verl", "model.path={}", ""),
    ],
)
def test_the_snippet_trains_the_base_on_whole_rows(run, tmp_path, model_pair, to, base, longest):
    snippet = export(run[0], to, str(tmp_path / "out"))
    assert base.format(model_pair[0]) in snippet
    assert longest in snippet


def test_trl_s_snippet_trains_without_a_gpu_as_it_says(run, tmp_path, monkeypatch):
    snippet = export(run[0], "trl", str(tmp_path / "out"))
    (without,) = re.findall(r"# without a GPU also (.*)\n", snippet)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    exec(snippet.replace("packing=False", f"packing=False, max_steps=1, report_to='none', {without}"), {})
    assert list((tmp_path / "model").glob("checkpoint-1/*.safetensors"))


def test_trl_trains_on_just_the_kept_tokens(run, tmp_path, model_pair, tokenizer):
    """Trainer's own count of items, its first trained token, and its loss against a plain one."""
    from trl import SFTConfig, SFTTrainer

    out = str(tmp_path / "out")
    export(run[0], "trl", out)
    rows = load("trl", out, tmp_path / "cache")
    settings = SFTConfig(
        output_dir=str(tmp_path / "model"), max_length=2048, per_device_train_batch_size=len(rows), max_steps=1,
        logging_steps=1, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model_pair[0], args=settings, train_dataset=rows, processing_class=tokenizer)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    batch = {name: batches[0][name].tolist() for name in ("input_ids", "attention_mask", "labels")}
    trainer.train()
    trained_on_the_kept_tokens(run, model_pair[0], int(count), trainer.state.log_history[0]["loss"], batch)


def trained_on_the_kept_tokens(run, model_path, count, loss, batch):
    """A trainer's own count of tokens, its labels and its loss in a first step over all rows, against plain ones."""
    kept = kept_set(run[1])
    assert count == len(kept)
    expected = {tuple(r["input_ids"]): r["labels"] for r in masked_rows(run[1]).values()}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = [t for t, m in enumerate(mask) if m]
        mine = expected[tuple(ids[t] for t in real)]
        assert [labels[t] for t in real] == mine
        first = next(t for t, label in enumerate(labels) if label != -100)
        assert first == real[next(t for t, label in enumerate(mine) if label != -100)]
    model, total = AutoModelForCausalLM.from_pretrained(model_path).eval(), 0.0
    for row in masked_rows(run[1]).values():
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[t - 1, label]) for t, label in enumerate(row["labels"]) if label != -100)
    assert loss == pytest.approx(total / len(kept), rel=1e-3)


def test_llamafactory_trains_on_just_the_kept_tokens(run, tmp_path, model_pair):
    """In an environment of its own, whose transformers and datasets are older than ours."""
    python = os.environ.get("TOKENCLEAN_LLAMAFACTORY")
    if not python:
        pytest.skip("TOKENCLEAN_LLAMAFACTORY names no Python that has llamafactory: make test-llamafactory")
    export(run[0], "llamafactory", str(tmp_path / "out"))
    script = Path(__file__).with_name("with_llamafactory") / "step.py"
    command = [python, script, tmp_path / "out", model_pair[0], tmp_path / "model"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    trained_on_the_kept_tokens(run, model_pair[0], found.pop("count"), found.pop("loss"), found)


def test_a_folder_of_other_things_is_left_alone(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(run[0], "trl", str(out))  # onto an empty folder
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    export(run[0], "trl", str(out))  # done before
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    for to, folder in (("hf", out), ("trl", tmp_path), ("trl", tmp_path / "file")):
        with pytest.raises(UserError, match="holds something else"):
            export(run[0], to, str(folder))
    with pytest.raises(UserError, match="export to a local folder"):
        export(run[0], "trl", "s3://pool/out")


def test_an_export_that_dies_leaves_nothing_to_train_on(run, tmp_path):
    """Killed when its first file is there: the folder is not; the same command then writes it."""
    command = [str(CONSOLE_SCRIPT), "export", run[0], "--to", "trl", "--out", str(tmp_path / "out")]
    code = "import os, signal, tokenclean_ray.export as e, tokenclean_ray.cli as c, sys; write = e._write_file\n"
    code += "e._write_file = lambda *a: (write(*a), os.kill(os.getpid(), signal.SIGKILL)); c.main(sys.argv[1:])"
    died = subprocess.run([sys.executable, "-c", code, *command[1:]], capture_output=True)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SFTTrainer" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(load("trl", str(tmp_path / "out"), tmp_path / "cache")) == run[1]["counts"]["masked"]


# -- the hub -----------------------------------------------------------------------------------------------------


class Hub(Handler):
    """As much of the hub's HTTP interface as a push uses; keeps what it is given."""

    created: list = []
    files: dict = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.answer({"url": f"http://{self.headers['Host']}/datasets/me/cleaned"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            return self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/datasets/me/cleaned/commit/0",
                    "commitOid": "0" * 40,
                    "hookOutput": "",
                    "success": True,
                }
            )
        return self.answer({"message": "yes"})

    def do_GET(self):
        if "/tree/" in self.path:
            return self.answer([{"type": "file", "path": path, "oid": "0", "size": 1} for path in self.files])
        return self.answer({"id": "me/cleaned", "sha": "0" * 40, "siblings": []})


def test_push_sends_the_folder_to_the_hub_in_place_of_what_was_pushed_before(run, tmp_path):
    """A process of its own, because the hub's address is read at import."""
    out = tmp_path / "out"
    before = {f"data/train-{n:05d}-of-00002.parquet": b"old" for n in range(2)}
    Hub.files.update(before, **{"notes.md": b"of a person"})
    command = [CONSOLE_SCRIPT, "export", run[0], "--to", "hf", "--out", str(out), "--push", "me/cleaned"]
    with serving(Hub) as address:
        hub = {"HF_ENDPOINT": f"http://{address}", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | hub, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{hub['HF_ENDPOINT']}/datasets/me/cleaned" in done.stdout
    assert Hub.created[0]["name"] == "cleaned"
    assert Hub.created[0]["type"] == "dataset"
    local = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != MARK}
    assert Hub.files == local | {"notes.md": b"of a person"}
    assert not before.keys() & local.keys()


def test_the_command_knows_every_format():
    assert tuple(FORMATS) == cli.EXPORTS


def test_only_hf_is_pushed(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["export", run[0], "--to", "trl", "--out", out, "--push", "me/cleaned"]) == 2
    assert "--push wants --to hf" in capsys.readouterr().err
    assert not os.path.exists(out)
