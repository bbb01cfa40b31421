"""Three hosts, which are network namespaces of this machine: each has an address, a /tmp and a home of its own. Data,
models and output lie on an S3 server that they know by its address alone; one host goes down while it scores."""

import json
import os
import secrets
import shutil
import subprocess
import sys

import boto3
import fsspec
import pytest
from conftest import ROOT, chat, make_llama, save, wait_for, write_rows
from moto.server import ThreadedMotoServer
from raylets import RAY, START_S, listed
from test_models import adapter

pytestmark = pytest.mark.faults

NETWORK = "10.77.0"
HOSTS = 3
PORT, DASHBOARD = 6379, 8265
TOKEN = secrets.token_hex(32)
STATE = f"http://{NETWORK}.1:{DASHBOARD}"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
DEADLINE_S = 240


def sudo(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def switch():
    """A bridge to which this machine belongs too."""
    name = "tokenclean"
    if missing := [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"no network namespaces without {', '.join(missing)}")
    made = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        sudo("ip", "address", "add", f"{NETWORK}.254/24", "dev", name)
        sudo("ip", "link", "set", name, "up")
        yield name
    finally:
        sudo("ip", "link", "delete", name)


class Host:
    """A network namespace, and a process that holds a mount namespace open while it is on."""

    def __init__(self, number, switch, environment):
        self.name, self.address, self._environment = f"tokenclean{number}", f"{NETWORK}.{number}", environment
        sudo("ip", "netns", "add", self.name)
        sudo("ip", "link", "add", f"v{self.name}", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        sudo("ip", "link", "set", f"v{self.name}", "master", switch, "up")
        for command in (f"address add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            sudo("ip", "-n", self.name, *command.split())
        own = "mount -t tmpfs tmpfs /tmp && mkdir /tmp/home && echo on && exec sleep infinity"
        power = ["ip", "netns", "exec", self.name, "unshare", "--mount", "sh", "-c", own]
        self._power = subprocess.Popen(power, stdout=subprocess.PIPE, text=True)
        assert self._power.stdout.readline() == "on\n"

    def start(self, *command, **how):
        """A process on the host."""
        inside = ["nsenter", f"--target={self._power.pid}", "--mount", "--net", *command]
        return subprocess.Popen(inside, env=self._environment, text=True, **how)

    def off(self):
        """Everything on it at once."""
        listed = ["ip", "netns", "pids", self.name]
        while pids := subprocess.run(listed, capture_output=True, text=True).stdout.split():
            subprocess.run(["kill", "-9", *pids], capture_output=True)
        self._power.wait()


@pytest.fixture(scope="module")
def s3(switch):
    """Its address, and a bucket."""
    server = ThreadedMotoServer(ip_address=f"{NETWORK}.254", port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="pool")
    yield address
    server.stop()


@pytest.fixture(scope="module")
def hosts(switch, s3, tmp_path_factory):
    """The first is the head."""
    logs = tmp_path_factory.mktemp("hosts")
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    own = {"HOME": "/tmp/home", "RAY_ADDRESS": f"{NETWORK}.1:{PORT}", "PYTHONPATH": str(ROOT)}
    given = {k: v for k, v in os.environ.items() if k not in ("RAY_TMPDIR", "XDG_CACHE_HOME", "HF_HOME")}
    made = []
    try:
        for number in range(1, HOSTS + 1):
            made.append(Host(number, switch, given | keys | token | own))
        for host in made:
            role = [f"--address={own['RAY_ADDRESS']}"]
            if host is made[0]:
                role = ["--head", f"--port={PORT}", f"--dashboard-host={host.address}", f"--dashboard-port={DASHBOARD}"]
            size = ["--num-cpus=1", f"--object-store-memory={80 << 20}"]
            host.start(
                *[RAY, "start", "--block", f"--node-ip-address={host.address}", *role, *size],
                stdout=(logs / f"{host.name}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
        yield made
    finally:
        for host in made:
            host.off()
            sudo("ip", "netns", "delete", host.name)


def alive():
    """Node id → address."""
    return {node["node_id"]: node["node_ip"] for node in listed(STATE, "nodes", **HEADERS) if node["state"] == "ALIVE"}


def addresses_that_score():
    address = alive()
    actors = [
        a for a in listed(STATE, "actors", **HEADERS) if "ScoringActor" in a["class_name"] and a["state"] == "ALIVE"
    ]
    return {address.get(actor["node_id"]) for actor in actors}


def test_a_job_over_hosts_that_share_nothing_but_a_store(hosts, s3, tmp_path, tokenizer):
    how = {"key": "x", "secret": "x", "endpoint_url": s3}
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **how)
    rows = [chat(f"what is {n}", "one two three four " * (n % 7 + 3)) | {"id": n} for n in range(300)]
    wide = make_llama(0, scale=3.0, hidden_size=64, intermediate_size=4096)
    base = save(tmp_path / "base", wide, tokenizer)
    for local, name in ((base, "base"), (adapter(tmp_path / "lora", base), "lora")):
        fs.put(f"{local}/", f"pool/models/{name}", recursive=True)
    fs.put(write_rows(tmp_path / "data.jsonl", rows), "pool/in/data.jsonl")
    values = {
        "output": "s3://pool/run",
        "endpoint_url": s3,
        "data": {"path": "s3://pool/in/*.jsonl", "part_bytes": 1024},
        "model": {"base": "s3://pool/models/base", "reference": "s3://pool/models/lora"},
        "score": {"num_actors": 2},
    }
    head = hosts[0]
    wait_for(lambda: set(alive().values()) == {host.address for host in hosts}, START_S)
    write = ["sh", "-c", 'cat > /tmp/run.yaml; exec "$@"', "sh"]
    job = head.start(
        *[*write, sys.executable, str(ROOT / "jobs" / "clean.py"), "/tmp/run.yaml"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    job.stdin.write(json.dumps(values))
    job.stdin.close()
    wait_for(lambda: fs.glob("pool/run/losses/*/part-*.parquet") or job.poll() is not None, DEADLINE_S)
    wait_for(lambda: len(addresses_that_score()) == 2 or job.poll() is not None, DEADLINE_S)
    scoring = addresses_that_score()
    assert job.poll() is None, job.stdout.read()
    lost = next(host for host in hosts[1:] if host.address in scoring)
    lost.off()
    said = job.stdout.read()
    assert job.wait() == 0, said
    assert "rows 300 = masked 300 + nothing kept 0 + rejected 0" in said
    assert json.loads(fs.cat("pool/run/masked/latest.json"))["snapshot"] == "v0001"
    assert set(alive().values()) == {host.address for host in hosts if host is not lost}
