"""Shared by all tests: tiny tokenizers and models made on the spot, the given fixtures, one Ray session."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import torch
from templates import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenclean_ray import schema

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails at once
os.environ.setdefault("RAY_ADDRESS", "local")  # not the Ray of another process of tests
os.environ["OMP_NUM_THREADS"] = "1"  # two processes of tests share two cores, and threads that wait spin
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "user assistant system tool",
    "0 1 2 3 4 5 6 7 8 9 + - = * / .",
]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_tokenizer(specials=("<s>", "</s>", "<|im_start|>", "<|im_end|>"), template=CHATML, eos="</s>", vocab=400):
    """A byte-level BPE tokenizer trained on a few sentences: every text has tokens, spaces merge into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 50, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=specials[0], additional_special_tokens=list(specials[2:])
    )
    fast.chat_template = template
    return fast


def make_llama(seed=0, vocab=400, scale=1.0, **config):
    """A random Llama of a few thousand parameters; `scale` sharpens its predictions."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"vocab_size": vocab, "max_position_embeddings": 512, **config}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def save(folder: Path, model, tokenizer=None) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows) -> str:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_scored(store, part, ids, masks, **losses):
    """A part of encoded rows, by lists of token ids and response masks; and of losses/NAME, by lists for each name."""
    numbers = list(range(len(ids)))
    rows = {"row": numbers, "source": ["s"] * len(ids), "input_ids": ids, "response_mask": masks}
    store.write_part("encoded", part, pa.table(rows, schema.encoded()), {})
    for name, lists in losses.items():
        store.write_part(f"losses/{name}", part, pa.table({"row": numbers, "loss": lists}, schema.losses()), {})


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_pair(tmp_path_factory, tokenizer):
    """Folders of a random base and a random reference that share the tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return (
        save(folder / "base", make_llama(0, scale=3.0), tokenizer),
        save(folder / "reference", make_llama(1, scale=3.0), tokenizer),
    )


@pytest.fixture
def start(tmp_path, tokenizer):
    """A model to be trained."""
    model = make_llama(0, scale=2.0)
    model.generation_config.max_new_tokens = 7
    return save(tmp_path / "start", model, tokenizer)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The given data and models; tests that need them are skipped without."""
    folder = os.environ.get("TOKENCLEAN_FIXTURES")
    if not folder:
        pytest.skip("TOKENCLEAN_FIXTURES is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_session():
    """One small Ray for the whole test run, also for the processes that tests start."""
    import ray

    from tokenclean_ray import workers

    workers.connect()
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield
    ray.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Says nothing of what it is asked."""

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=()):
        """Bytes as they are, anything else as JSON; a HEAD gets no body."""
        is_bytes = isinstance(value, bytes)
        data = value if is_bytes else json.dumps(value).encode()
        self.send_response(status)
        kind = () if is_bytes else (("Content-Type", "application/json"),)
        for header in (*kind, ("Content-Length", str(len(data))), *headers):
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def serving(handler):
    """The address of an HTTP server, as host:port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def run_job(folder, name, *arguments, **how):
    """The script of a job as a process of its own, in a folder; waits for its end."""
    job = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    return subprocess.run(job, cwd=folder, capture_output=True, text=True, timeout=900, **how)


def run_python(code, *arguments, **environment):
    """What a process printed that ran some code; fails where it did."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition, seconds=300.0):
    """Return the condition's value once it is true; fail after a while, since a machine may be very slow."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that logs what it asks of the network; tests that need it are skipped where there is none."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("there is no chromium with chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def s3_server():
    """The address of a local S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """The URL of an empty bucket; the environment says how to get there."""
    import boto3

    name = f"pool-{uuid.uuid4().hex}"
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=s3_server, **keys).create_bucket(Bucket=name)
    environment = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    fsspec.filesystem("s3").clear_instance_cache()  # an instance keeps the address that it was made with
    yield f"s3://{name}"
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def asked(monkeypatch):
    """The names of the requests that this process makes of S3, as they come."""
    from aiobotocore.client import AioBaseClient  # below s3fs: some versions list by botocore's own paginator
    from botocore import xform_name

    found, call = [], AioBaseClient._make_api_call

    def noted(client, operation, *arguments, **options):
        found.append(xform_name(operation))
        return call(client, operation, *arguments, **options)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noted)
    return found
