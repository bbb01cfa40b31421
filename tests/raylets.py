"""Clusters on this machine: three raylets as a process of its own, and its killer; and a head as users start it.

Run as a script it prints the cluster's address, then obeys lines on standard input: `add` a node, `remove` one.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from conftest import ROOT, wait_for

START_S = 240  # machines that share their cores may be very slow
RAY = str(Path(sys.executable).with_name("ray"))


class Cluster:
    """The script as a child process. A context manager: nothing that it started outlives it."""

    def __init__(self, **environment: str) -> None:
        # a folder of its own: a killed cluster leaves a note in the shared one, and the next `ray.init` looks for it
        self._folder = tempfile.mkdtemp(prefix="ray-")
        own = {"PYTHONPATH": str(ROOT), "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_TMPDIR": self._folder}
        self.environment = os.environ | own | environment

    def __enter__(self):
        self.start()
        return self

    def start(self):
        self._script = psutil.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
        )
        self.environment["RAY_ADDRESS"] = self._answer()

    def _answer(self):
        line = self._script.stdout.readline().strip()
        assert line, "the cluster ended"
        return line

    def order(self, what):
        self._script.stdin.write(what + "\n")
        self._script.stdin.flush()
        assert self._answer() == what

    def processes(self, word):
        """Those of the cluster whose command line holds a word, in the order of their start."""
        return processes(self._script, word)

    def session(self):
        """The folder of its logs."""
        (argument, *_) = [a for a in self.processes("raylet/raylet")[0].cmdline() if a.startswith("--session_dir=")]
        return Path(argument.partition("=")[2])

    def kill(self):
        """Everything at once."""
        doomed = [self._script, *self._script.children(recursive=True)]
        for process in doomed:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(doomed, timeout=30)

    def __exit__(self, *_):
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def processes(ancestor, word):
    """Those that a process has started whose command line holds a word, in the order of their start."""
    found = {}
    for process in ancestor.children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found[process] = process.create_time()
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=found.get)  # their numbers begin anew at times


@contextlib.contextmanager
def head(*arguments, port=0, **environment):
    """`ray start --head`; gives the environment of its clients, and the URL of its dashboard. Nothing that it started
    outlives it."""
    folder = tempfile.mkdtemp(prefix="ray-")
    dashboard = free_port()
    # where jobs find python
    path = {"PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}"}
    own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | path | environment
    start = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    start += [f"--dashboard-agent-listen-port={free_port()}"]  # the usual one may be the Ray's of other tests
    url = f"http://127.0.0.1:{dashboard}"
    with open(f"{folder}.log", "wb") as log:
        server = psutil.Popen([*start, f"--temp-dir={folder}", *arguments], env=own, stdout=log, stderr=log)
    try:
        wait_for(lambda: _answers(url) or server.poll() is not None, START_S)
        assert server.is_running(), Path(f"{folder}.log").read_text()
        yield own, url
    finally:
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes)
        shutil.rmtree(folder, ignore_errors=True)
        os.remove(f"{folder}.log")


def _answers(url):
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=30).close()
    except urllib.error.HTTPError:
        return True  # one that wants a token
    except OSError:
        return False
    return True


def listed(url, what, **headers):
    """Of the state API at a dashboard, whatever Ray this process is in; empty before it answers."""
    asked = urllib.request.Request(f"{url}/api/v0/{what}?detail=True&limit=1000", headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)["data"]["result"]["result"]
    except OSError:
        return []


def free_port():
    """A TCP port that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    from ray.cluster_utils import Cluster as Raylets

    size = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Raylets(initialize_head=True, head_node_args=size)
    nodes = [cluster.add_node(**size) for _ in range(2)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            nodes.append(cluster.add_node(**size))
        elif nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=True)
        print(line.strip(), flush=True)


if __name__ == "__main__":
    main()
