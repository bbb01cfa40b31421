"""One run at a time: who is told what, what happens to the lock of the dead, and what a run does that lost its own."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, run_job, write_rows

from tokenclean_ray import lock
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.lock import hold, newest

HOLDER = """
import sys
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.lock import hold
print("ready", flush=True)
sys.stdin.readline()
try:
    with hold(Store(sys.argv[1]), "evolve"):
        print("held", flush=True)
        sys.stdin.read()
except UserError:
    print("refused", flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    url = str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return Store(url)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lock, "LEASE_S", 3.0)
    monkeypatch.setattr(lock, "POLL_S", 0.05)


def start(url):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def start_holder(url):
    holder = start(url)
    holder.stdin.write("go\n")
    holder.stdin.flush()
    assert [holder.stdout.readline() for _ in range(2)] == ["ready\n", "held\n"]
    return holder


def edit(store, **changes):
    (name,) = store.names("lock")
    store.write_json(f"lock/{name}", store.read_json(f"lock/{name}") | changes)


def test_the_second_run_is_told_who_is_there_and_leaves(tmp_path, model_pair):
    write_rows(tmp_path / "data.jsonl", [{"question": "q", "answer": "a"}])
    values = {"output": "run", "data": {"path": "data.jsonl"}, "model": {"base": model_pair[0]}}
    values["model"]["reference"] = model_pair[1]
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    holder = start_holder(str(tmp_path / "run"))
    files = sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file())
    done = run_job(tmp_path, "clean", "run.yaml")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"in use by tokenclean evolve (process {holder.pid} on {os.uname().nodename}, since 20" in line
    assert "set another output" in line
    assert sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file()) == files
    holder.communicate("")
    assert holder.returncode == 0
    with hold(Store(str(tmp_path / "run")), "clean"):  # let go, so there is nothing to wait for
        pass


def test_a_dead_run_on_this_machine_is_followed_at_once(store):
    holder = start_holder(store.url)
    holder.kill()
    holder.communicate()
    began = time.monotonic()
    with hold(store, "clean"):
        assert time.monotonic() - began < lock.HEARTBEAT_S
        assert [store.read_json(f"lock/{name}")["command"] for name in store.names("lock")] == ["tokenclean clean"]


@pytest.mark.usefixtures("fast")
def test_a_dead_run_of_another_machine_is_followed_after_its_lease(store, capfd):
    holder = start_holder(store.url)
    holder.kill()
    holder.communicate()
    edit(store, machine="elsewhere", host="node-7")
    began = time.monotonic()
    with hold(store, "clean"):
        assert time.monotonic() - began >= lock.LEASE_S
    assert "on node-7" in capfd.readouterr().err


@pytest.mark.usefixtures("fast")
def test_a_living_run_of_another_machine_is_noticed_by_its_beats(store, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_S", 60)  # beats of a slow machine come late
    with hold(store, "train") as held:
        held._record |= {"machine": "elsewhere", "host": "node-7"}
        with pytest.raises(UserError, match=r"in use by tokenclean train .* on node-7"), hold(store, "clean"):
            pass
        held.check()


def take_over(store, held):
    assert store.create_bytes("lock/00000002.json", json.dumps(held._record).encode())


@pytest.mark.usefixtures("fast")
def test_a_run_that_lost_its_lock_is_stopped_wherever_it_waits(store):
    """Also where a shell has put it in the background, with interrupts ignored."""
    woken = threading.Event()
    interrupts = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def work():
        with hold(store, "clean") as held:
            take_over(store, held)
            woken.wait(60)
            woken.set()

    with pytest.raises(UserError, match=r"tokenclean clean .* took over"):
        work()
    signal.signal(signal.SIGINT, interrupts)
    assert not woken.is_set()
    assert store.names("lock")[-1] == "00000002.json"
    assert "released" not in store.read_json("lock/00000002.json")


def test_a_run_that_slept_past_its_lease_publishes_nothing(store):
    """No beat has been missed yet: the look before publishing finds the other run."""

    def work():
        with hold(store, "clean") as held:
            held.check()
            take_over(store, held)
            held.check()

    with pytest.raises(UserError, match="took over"):
        work()


def test_of_many_at_once_one_gets_in(tmp_path):
    runs = [start(str(tmp_path / "run")) for _ in range(4)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    answers = [run.stdout.readline() for run in runs]
    for run in runs:
        run.communicate("")
    assert sorted(answers) == ["held\n", "refused\n", "refused\n", "refused\n"]


def test_a_file_that_is_no_number_is_no_lock(store):
    store.write_json("lock/00000001 (copy).json", {})
    with hold(store, "clean"):
        assert newest(store)["command"] == "tokenclean clean"


def test_create_bytes_never_replaces(store):
    assert store.create_bytes("a/b", b"1")
    assert not store.create_bytes("a/b", b"2")
    assert store.create_bytes("a/b", b"1")  # the same once more: the answer to the first try may have been lost
    fs, where = store._locate("a/b")
    assert fs.cat_file(where) == b"1"


def test_a_filesystem_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_create_bytes_never_replaces(Store(str(tmp_path)))
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]


def test_one_of_many_creates(tmp_path):
    store = Store(str(tmp_path))
    with ThreadPoolExecutor(16) as pool:
        for n in range(20):
            won = list(pool.map(lambda i, n=n: store.create_bytes(f"x/{n}", b"%d" % i), range(16)))
            assert sum(won) == 1
            assert (tmp_path / "x" / str(n)).read_bytes() == b"%d" % won.index(True)


def test_a_filesystem_without_exclusive_creation_is_warned_of(capfd):
    with hold(Store("memory://run"), "clean"):
        assert "two runs at once are not kept apart" in capfd.readouterr().err
