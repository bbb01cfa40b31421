"""A cluster that is a head alone until a job asks for more, under Ray's own autoscaler, whose nodes are raylets of this
machine: it grows for `clean` and `train`, places them by label, and shrinks afterwards. And training whose workers
become fewer as nodes go, and more as they come."""

import contextlib
import itertools
import json
import os
import signal

import pytest
from conftest import ROOT, chat, make_llama, run_job, save, wait_for, write_rows
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address
from raylets import Cluster, free_port, head, listed
from test_train import config_for, masked_rows, newest_progress, newest_step, train_process, write_masked

from tokenclean_ray.finetune import Rows, make_optimizer, train_steps
from tokenclean_ray.token_loss import TokenLoss

pytestmark = pytest.mark.faults

DEADLINE_S = 240
HEAD = "ray.head.default"
MAPS = ("auth", "file_mounts", "docker")
LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
)
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "PYTHONPATH": str(ROOT),
}


def node_type(most, **labels):
    resources = {"CPU": 1, "object_store_memory": 80 << 20}
    return {"resources": resources, "labels": labels, "node_config": {}, "min_workers": 0, "max_workers": most}


@contextlib.contextmanager
def head_alone(folder):
    """The environment of a driver, and the address of the state API."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "grows",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "plain": node_type(1, kind="plain"),
            "strong": node_type(2, kind="strong"),
        },
        "head_node_type": HEAD,
        **{key: {} for key in MAPS},
        **{key: [] for key in LISTS},
    }
    (folder / "autoscaler.json").write_text(json.dumps(config))
    arguments = ["--num-cpus=0", f"--autoscaling-config={folder}/autoscaler.json"]
    with head(*arguments, port=port, **ENVIRONMENT) as (environment, url):
        wait_for(lambda: listed(url, "nodes"))
        yield environment | {"RAY_ADDRESS": address}, url


def workers(state):
    """Node id → its labels, of the nodes that are alive, but the head."""
    nodes = listed(state, "nodes")
    return {node["node_id"]: node["labels"] for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]}


def run(job, config, environment):
    done = run_job(config.parent, job, str(config), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_cluster_grows_for_a_job_and_shrinks_afterwards(tmp_path, model_pair):
    rows = [chat(f"what is {n}", "one two three four " * (n % 7 + 3)) | {"id": n} for n in range(60)]
    strong = {"kind": "strong"}
    values = {
        "output": str(tmp_path / "run"),
        "data": {"path": write_rows(tmp_path / "data.jsonl", rows), "part_bytes": 1024},
        "model": {"base": model_pair[0], "reference": model_pair[1], "device": "cpu"},
        "score": {"num_actors": [1, 2], "label_selector": strong},
        "train": {"data": str(tmp_path / "run"), "num_workers": 2, "label_selector": strong, "lora": {"r": 4}},
    }
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(values))
    with head_alone(tmp_path) as (environment, state):
        assert workers(state) == {}
        assert "rows 60 = masked 60 + nothing kept 0 + rejected 0" in run("clean", config, environment)
        scoring = [actor for actor in listed(state, "actors") if "ScoringActor" in actor["class_name"]]
        labels = {node["node_id"]: node["labels"] for node in listed(state, "nodes")}
        assert scoring
        assert {labels[actor["node_id"]]["kind"] for actor in scoring} == {"strong"}
        wait_for(lambda: not workers(state), DEADLINE_S)
        assert "steps over" in run("train", config, environment)
        wait_for(lambda: not workers(state), DEADLINE_S)


def test_training_goes_on_with_as_many_workers_as_there_are_nodes(tmp_path, tokenizer):
    """Three, then two, then three again: nothing committed is lost, and no loss of a step depends on it."""
    rows = write_masked(tmp_path / "data", masked_rows(60))
    model = make_llama(0)
    start = save(tmp_path / "start", model, tokenizer)
    settings = {"method": "full", "learning_rate": 1e-4, "epochs": 400, "checkpoint_every_steps": 20}
    run = tmp_path / "run"
    steps = [0]
    with Cluster() as cluster:

        def come_further_with(workers):
            assert job.poll() is None, job.communicate()
            return len(cluster.processes("RayTrainWorker")) == workers and newest_step(run) > steps[-1]

        job = train_process(tmp_path, "run", start, cluster.environment, num_workers=(1, 3), **settings)
        for order, workers in ((None, 3), ("remove", 2), ("add", 3)):
            if order:
                cluster.order(order)
            wait_for(lambda workers=workers: come_further_with(workers), DEADLINE_S)
            steps.append(newest_step(run))
        os.killpg(job.pid, signal.SIGKILL)  # its end is that of any training
        job.communicate()
    losses = newest_progress(run)["loss"]
    assert len(losses) >= steps[-1] >= 60
    here, train = TokenLoss(model), config_for(tmp_path, start, **settings).train
    alone = train_steps(here, make_optimizer(here, train), Rows.of(rows), train, seed=0)
    expected = [loss for _, loss, _ in itertools.islice(alone, len(losses))]
    assert losses == pytest.approx(expected, abs=1e-3)
