"""Storage and network that fail: a full disk, an object store that fails one call in ten, RPCs lost or late."""

import contextlib
import http.client
import json
import os
import random
import subprocess
import tempfile
import threading
from http.server import ThreadingHTTPServer

import pyarrow as pa
import pytest
import s3fs
from conftest import ROOT, Handler, run_job, write_rows
from raylets import Cluster
from test_rounds import some_rows

from tokenclean_ray.layout import Store
from tokenclean_ray.lock import hold

pytestmark = pytest.mark.faults

READ_TIMEOUT_S = s3fs.S3FileSystem.read_timeout
SEED = int(os.environ.get("FAULT_SEED", "0"))


@pytest.fixture(scope="module")
def case(tmp_path_factory, model_pair):
    """A config of about ten parts."""
    folder = tmp_path_factory.mktemp("storage")
    values = {
        "data": {"path": write_rows(folder / "data.jsonl", some_rows(120)), "part_bytes": 4096},
        "model": {"base": model_pair[0], "reference": model_pair[1]},
        "score": {"num_actors": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder


def clean(case, output, **environment):
    """On a Ray of its own, where the environment names none."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder} | environment
        return run_job(case, "clean", "run.yaml", f"output={output}", env=environment)


@pytest.fixture(scope="module")
def whole(case):
    """The rows of an undisturbed run."""
    done = clean(case, "whole")
    assert done.returncode == 0, done.stderr
    return published(str(case / "whole"))


def published(url):
    store = Store(url)
    manifest = store.read_json("masked/v0001/manifest.json")
    return {part: store.read_part("masked/v0001", part).to_pylist() for part in manifest["parts"]}


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 192 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_then_goes_on(case, whole, small_disk):
    first = clean(case, small_disk / "run")
    assert first.returncode == 2, first.stderr
    assert "Traceback" not in first.stderr
    assert "No space left on device" in first.stderr.splitlines()[-1]
    assert "the same command goes on" in first.stderr.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    second = clean(case, small_disk / "run")
    assert second.returncode == 0, second.stderr
    assert published(str(small_disk / "run")) == whole


class Failing(Handler):
    """Passes requests on to an object store, but for some: 503, a connection cut, an answer lost or too late."""

    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body = self.body()
        fault = self.server.draw()
        if fault == "late":
            threading.Event().wait(READ_TIMEOUT_S + 2)
        if fault in ("cut", "late"):
            self.close_connection = True
            return
        if fault == "503":
            self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Please reduce</Message></Error>")
            return
        hop = ("connection", "accept-encoding", "transfer-encoding", "content-length", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        store = http.client.HTTPConnection(self.server.store.removeprefix("http://"), timeout=60)
        store.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        found = store.getresponse()
        content = found.read()
        store.close()
        if fault == "lost":  # carried out, and nobody is told
            self.close_connection = True
            return
        self.answer(found.status, found.headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length") or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class FailingStore(ThreadingHTTPServer):
    """Counts what it did to whom."""

    daemon_threads = True

    def __init__(self, store, share):
        super().__init__(("127.0.0.1", 0), Failing)
        self.store, self.share, self.faults = store, share, []
        self._rng, self._lock = random.Random(SEED), threading.Lock()

    def draw(self):
        with self._lock:
            if self._rng.random() >= self.share:
                return None
            kinds = ["503", "cut", "lost"] + ["late"] * (self.faults.count("late") < 2)  # they take their time
            self.faults.append(self._rng.choice(kinds))
            return self.faults[-1]


@contextlib.contextmanager
def failing_store(share):
    with FailingStore(os.environ["AWS_ENDPOINT_URL"], share) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_store_that_fails_one_call_in_ten(case, whole, bucket):
    with failing_store(0.1) as server:
        done = clean(case, f"{bucket}/tenth", AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_port}")
    assert done.returncode == 0, done.stderr
    assert set(server.faults) == {"503", "cut", "lost", "late"}
    assert published(f"{bucket}/tenth") == whole


def test_parts_and_the_lock_survive_one_failing_call_in_ten(bucket, monkeypatch):
    with failing_store(0.1) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        store = Store(f"{bucket}/parts")
        with hold(store, "clean") as lock:
            for n in range(25):
                store.write_part("encoded", f"part-{n}", pa.table({"row": list(range(50))}), {"rows": 50})
                assert store.has_part("encoded", f"part-{n}")
                assert store.read_part("encoded", f"part-{n}").num_rows == 50
                assert store.create_bytes(f"claims/{n}", b"mine")  # even where the answer was lost
                assert not store.create_bytes(f"claims/{n}", b"other")
            lock.check()
    assert set(server.faults) == {"503", "cut", "lost", "late"}


def test_a_store_that_always_fails_ends_in_one_line(case, bucket):
    with failing_store(1.0) as server:
        done = clean(case, f"{bucket}/never", AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_port}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the same command goes on" in done.stderr.splitlines()[-1]


RPCS = [
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "CoreWorkerService.grpc_client.PushTask",
    "ActorInfoGcsService.grpc_client.RegisterActor",
    "ActorInfoGcsService.grpc_client.CreateActor",
]
SOME = {"num_failures": 4, "req_failure_prob": 15, "resp_failure_prob": 15, "in_flight_failure_prob": 0}
LOST = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(RPCS, SOME))}
LATE = "CoreWorkerService.grpc_server.PushTask=0:300000,NodeManagerService.grpc_server.RequestWorkerLease=0:300000"


def test_calls_within_ray_that_are_lost(case, whole, tmp_path):
    """By Ray's own fault injection; the driver inherits it too."""
    faults = {"RAY_testing_rpc_failure_avoid_intra_node_failures": "0", "RAY_BACKEND_LOG_LEVEL": "info"}
    with Cluster(**LOST, **faults) as cluster:
        done = clean(case, tmp_path / "run", **cluster.environment)
        logs = "".join(path.read_text(errors="replace") for path in cluster.session().glob("logs/*.*"))
    assert done.returncode == 0, done.stderr
    assert "Inject RPC request failure" in logs
    assert "Inject RPC response failure" in logs
    assert published(str(tmp_path / "run")) == whole


def test_calls_within_ray_that_are_late(case, whole, tmp_path):
    with Cluster(RAY_testing_asio_delay_us=LATE) as cluster:
        done = clean(case, tmp_path / "run", **cluster.environment)
    assert done.returncode == 0, done.stderr
    assert published(str(tmp_path / "run")) == whole
