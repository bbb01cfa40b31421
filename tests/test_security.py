"""Nothing in data, models or checkpoints runs; nothing is written outside the run; no secret is shown or stored."""

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Handler, make_llama, run_job, save, serving, write_rows
from test_models import adapter
from test_rounds import config_for, some_rows
from test_train import config_for as train_config
from test_train import masked_rows, write_masked

from tokenclean_ray import cli, rounds
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError, redact
from tokenclean_ray.layout import TRAINED, Store
from tokenclean_ray.masked_rows import MaskedRows
from tokenclean_ray.models import describe, load_adapter, load_model, load_tokenizer
from tokenclean_ray.pipeline import plan_parts
from tokenclean_ray.source import plan_file
from tokenclean_ray.workers import FEW_PARTS


class Bomb:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def fuse(tmp_path):
    """A path that exists only if a bomb went off."""
    path = tmp_path / "went-off"
    yield path
    assert not path.exists()


def test_a_bomb_goes_off(tmp_path):
    """Else the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "x")))
    assert (tmp_path / "x").exists()


# ---- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "training_args.bin"])
def test_a_pickle_in_a_model_s_folder(tmp_path, fuse, tokenizer, name):
    """Beside the weights it is left alone; instead of them it is refused."""
    folder = Path(save(tmp_path / "m", make_llama(), tokenizer))
    bomb = pickle.dumps({"lm_head.weight": Bomb(fuse)})
    (folder / name).write_bytes(bomb)
    if name == "model.safetensors":
        with pytest.raises(UserError, match="its weights are damaged"):
            describe(str(folder))
        return
    load_model(describe(str(folder)).path, torch.float32, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        describe(str(folder))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder), torch.float32, "cpu")


def test_a_pickle_for_an_adapter(tmp_path, fuse, model_pair):
    base = describe(model_pair[0])
    folder = Path(adapter(tmp_path / "lora", model_pair[0]))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(fuse)))
    load_adapter(load_model(base.path, torch.float32, "cpu"), describe(str(folder), base).adapter)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        describe(str(folder), base)


def test_vllm_is_told_to_load_no_pickle():
    values = {"output": "o", "data": {"path": "x"}, "model": {"base": "b", "reference": "r"}}
    for arguments, expected in (({"load_format": "pt"}, "never loaded"), ({"trust_remote_code": True}, "model.trust")):
        with pytest.raises(UserError, match=expected):
            build_config(values | {"score": {"backend": "vllm", "vllm": arguments}})


def pickled_column(fuse) -> bytes:
    """Parquet whose values Ray's extension type unpickles when they are read."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    storage = pa.array([pickle.dumps(Bomb(fuse))], pa.large_binary())
    column = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"], "source": column, "input_ids": column}), sink)
    return sink.getvalue()


@pytest.mark.usefixtures("ray_session")
def test_pickles_in_parquet(tmp_path, fuse):
    """In rows, in a part of the run folder, in a dataset to train on."""
    (tmp_path / "encoded").mkdir()
    file = tmp_path / "encoded" / "part-0.parquet"
    file.write_bytes(pickled_column(fuse))
    with pytest.raises(UserError, match=r"column source is of the extension type ray\.data\.arrow_pickled_object"):
        plan_file(str(file), "rows", 1 << 20, "e")
    with pytest.raises(UserError, match="extension type"):
        Store(str(tmp_path)).read_part("encoded", "part-0")
    with pytest.raises(UserError, match="rows of input_ids and labels"):
        MaskedRows((str(file),))
    with pytest.raises(UserError, match="extension type"):
        list(plan_parts([(str(file), "rows")], 1 << 20, "e"))


def pickles_in(folder: Path) -> list[Path]:
    """Files that begin as pickles of protocol 2 and later do, or zip archives of torch.save."""
    heads = {file: file.read_bytes()[:2] for file in folder.rglob("*") if file.is_file()}
    return [file for file, head in heads.items() if head[:1] == b"\x80" or head == b"PK"]


@pytest.mark.train
@pytest.mark.usefixtures("ray_session")
def test_training_leaves_no_pickle_and_loads_none(tmp_path, fuse, tokenizer):
    """The checkpoint that is resumed from is safetensors and JSON alone, whatever lies beside it."""
    start = save(tmp_path / "start", make_llama(0, scale=2.0), tokenizer)
    write_masked(tmp_path / "data", masked_rows())
    config = train_config(tmp_path, start, checkpoint_every_steps=2)
    record = rounds.train(config)
    checkpoints = [c for c in (tmp_path / "run" / "train").rglob("checkpoint_*") if c.is_dir()]
    assert checkpoints
    assert {file.suffix for c in checkpoints for file in c.iterdir()} <= {".safetensors", ".json"}
    assert not pickles_in(tmp_path / "run")
    # a bomb where torch.distributed.checkpoint looks for its own metadata, and the model made again from the checkpoint
    for checkpoint in checkpoints:
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(fuse)))
    manifest = Path(record["path"]) / TRAINED
    manifest.unlink()
    assert rounds.train(config)["loss"] == record["loss"]


# ---- code of models

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({mark!r}, "a").close()

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def strange(tmp_path, tokenizer):
    """A model that brings its own code, which leaves a mark when it runs."""
    folder = Path(save(tmp_path / "strange", make_llama(1, scale=3.0), tokenizer))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    config |= {"model_type": "strange", "auto_map": classes, "architectures": ["StrangeModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return str(folder)


def test_a_model_s_code_does_not_run(tmp_path, strange):
    """And nobody is asked whether it may."""
    load_tokenizer(strange)  # it needs none
    for use in (describe, lambda path: load_model(path, torch.float32, "cpu")):
        with pytest.raises(UserError, match="custom code"):
            use(strange)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_name_is_not_trusted():
    values = {"output": "o", "data": {"path": "x"}, "model": {"base": "b/m", "reference": "r"}}
    values["model"]["trust_remote_code"] = ["b/n"]
    with pytest.raises(UserError, match=r"b/n is no model of this config; did you mean b/m\?"):
        build_config(values)


@pytest.mark.usefixtures("ray_session")
def test_the_code_of_a_model_that_the_config_names_runs(tmp_path, strange, model_pair):
    """In the driver and in the scoring actors; another model of the same run stays untrusted."""
    rows = some_rows(10)
    with pytest.raises(UserError, match="custom code"):
        rounds.clean(config_for(tmp_path, (model_pair[0], strange), rows))
    model = {"base": model_pair[0], "reference": strange, "trust_remote_code": [strange]}
    record = rounds.clean(config_for(tmp_path, model_pair, model=model, score={"num_actors": 1}))
    assert (tmp_path / "ran").exists()
    assert [record["models"][role]["trusted"] for role in ("base", "reference")] == [False, True]
    assert record["counts"]["masked"] == 10


@pytest.mark.usefixtures("ray_session")
def test_the_code_of_a_tokenizer_runs_where_it_is_trusted(tmp_path, model_pair, capsys):
    """In the driver, in the workers that encode, which have no such module, and in the report."""
    folder = Path(shutil.copytree(model_pair[0], tmp_path / "own"))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for n in range(FEW_PARTS + 1):  # more than the driver encodes by itself
        write_rows(tmp_path / f"{n}.jsonl", some_rows(4, seed=n))
    config = {
        "output": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "*.jsonl")},
        "model": {"base": str(folder), "reference": model_pair[1], "trust_remote_code": [str(folder)]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert cli.main(["clean", str(tmp_path / "run.yaml")]) == 0
    assert cli.main(["report", config["output"]]) == 2
    assert "tokenizer cannot be loaded" in capsys.readouterr().err
    assert cli.main(["report", config["output"], "--trust-remote-code"]) == 0


# ---- paths


@pytest.mark.usefixtures("ray_session")
def test_names_in_data_never_become_paths(tmp_path, model_pair):
    names = ["../../evil", "/tmp/evil", "..", "a/../../b", "file:///tmp/evil", "\\..\\x", "~/.ssh/id", "%2e%2e/x"]
    rows = [row | {"id": names[n % 8], "source": names[n % 8]} for n, row in enumerate(some_rows(16))]
    config = config_for(tmp_path / "inside", model_pair, rows)
    before = {p for p in tmp_path.rglob("*") if tmp_path / "inside" / "run" not in p.parents}
    record = rounds.clean(config)
    after = {p for p in tmp_path.rglob("*") if tmp_path / "inside" / "run" not in p.parents}
    assert after - before == {tmp_path / "inside" / "run"}
    assert set(record["threshold"]["sources"]) == set(names)
    files = [p.name for p in (tmp_path / "inside" / "run").rglob("*") if p.is_file()]
    assert not [name for name in files if "evil" in name or ".." in name]


# ---- secrets

PASSWORD, TOKEN, VARIABLE = "hunter2-pass", "tok-0123456789", "hf_abcdefghijklmnop"
SECRETS = (PASSWORD, TOKEN, VARIABLE)
URL = f"https://me:{PASSWORD}@example.invalid/rows.jsonl?version=3&token={TOKEN}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "https://***@example.invalid/rows.jsonl?version=3&token=***"),
        (f"s3://key:{PASSWORD}@bucket/a", "s3://***@bucket/a"),
        (f'{{"a": "{URL}", "b": 1}}', '{"a": "https://***@example.invalid/rows.jsonl?version=3&token=***", "b": 1}'),
        (f"https://h/x?X-Amz-Signature={TOKEN}&X-Amz-Date=1", "https://h/x?X-Amz-Signature=***&X-Amz-Date=1"),
        (f"https://h/x?sig={TOKEN}#part", "https://h/x?sig=***#part"),
        (f"https://h/x?AWSAccessKeyId={TOKEN}", "https://h/x?AWSAccessKeyId=***"),
        (f"header Bearer {VARIABLE}", "header Bearer ***"),
        ("hf://datasets/owner/name@main/a.parquet", "hf://datasets/owner/name@main/a.parquet"),
        ("s3://bucket/key=1/a@b", "s3://bucket/key=1/a@b"),
        ("mail me@example.com? yes", "mail me@example.com? yes"),
    ],
)
def test_redact(monkeypatch, text, shown):
    monkeypatch.setenv("HF_TOKEN", VARIABLE)
    assert redact(text) == shown
    assert redact(redact(text)) == shown


def test_secrets_are_variables_that_are_named_so(monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "OPENAI_API_KEY", "SMTP_CREDENTIALS"):
        monkeypatch.setenv(name, f"of-{name}")
        assert redact(f"see of-{name} here") == "see *** here"
    for name in ("TOKENIZER_PATH", "TOKENCLEAN_FIXTURES", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "/models/llama-3b")
    assert redact("/models/llama-3b") == "/models/llama-3b"


def test_object_stores_take_no_credentials_in_urls():
    with pytest.raises(UserError, match="set them in the environment") as caught:
        build_config({"output": f"s3://key:{PASSWORD}@b/run"}, "train")
    assert PASSWORD not in str(caught.value)


@pytest.fixture
def web():
    """The URL of rows on a web server that wants the password, which the URL holds."""
    content = b"\n".join(json.dumps(row).encode() for row in [*some_rows(19), {"messages": []}]) + b"\n"

    class Rows(Handler):
        def do_GET(self):
            if "Authorization" not in self.headers:
                self.send_response(401)
                self.end_headers()
                return
            start, _, stop = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            body = content[int(start) : int(stop) + 1 if stop else None]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(body) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with serving(Rows) as address:
        yield f"http://me:{PASSWORD}@{address}/rows.jsonl"


def found_in(folder: Path, secrets) -> list[str]:
    """Files that hold a secret; Parquet is read, since its pages are compressed."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file():
            text = str(pq.read_table(file).to_pylist()) if file.suffix == ".parquet" else file.read_text("latin-1")
            found += [f"{file}: {secret}" for secret in secrets if secret in text]
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_run_leaves_no_secret_behind(tmp_path, model_pair, web):
    """Neither in what it writes nor in what it says; a process of its own, with secrets in its environment."""
    values = {
        "output": "run",
        "data": {"path": web, "max_rejected": 0.2},
        "model": {"base": model_pair[0], "reference": model_pair[1]},
        "score": {"num_actors": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    environment = os.environ | {"HF_TOKEN": VARIABLE, "AWS_SECRET_ACCESS_KEY": TOKEN}
    done = run_job(tmp_path, "clean", "run.yaml", env=environment)
    assert done.returncode == 0, done.stderr
    shown = redact(web)
    assert "***@127.0.0.1" in shown
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["data"]["path"] == [shown]
    assert record["counts"]["rejected"] == 1
    (rejected,) = (tmp_path / "run" / "rejected").iterdir()
    assert pq.read_table(rejected)["file"].to_pylist() == [shown]
    assert set(record["threshold"]["sources"]) == {"s0", "s1", "s2"}
    assert not found_in(tmp_path / "run", SECRETS)
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    # a typo in a secret URL, and a server that is not there
    for wrong in (web.replace("rows.jsonl", "rows.csv"), f"http://me:{PASSWORD}@127.0.0.1:1/a.jsonl?token={TOKEN}"):
        failed = run_job(tmp_path, "clean", "run.yaml", f"data.path={wrong}", "output=other", env=environment)
        assert failed.returncode != 0
        assert "127.0.0.1" in failed.stderr
        assert not [secret for secret in SECRETS if secret in failed.stdout + failed.stderr]


def test_a_traceback_shows_no_secret(capsys, monkeypatch):
    """Of an error that nobody foresaw."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert cli.main(["clean", "nowhere.yaml"]) == 2
    try:
        raise RuntimeError(f"GET {URL}")
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "***@example.invalid" in err
    assert not [secret for secret in SECRETS if secret in err]
