"""What Prometheus finds at a node of a real Ray after a run, and what the dashboard asks for."""

import json
import re
import urllib.request

import ray
from conftest import ROOT, wait_for
from prometheus_client.parser import text_string_to_metric_families
from test_rounds import config_for, some_rows

from tokenclean_ray import metrics, rounds

# of Ray's own that the dashboard shows; GPUs and pending nodes there are none of here
RAY = {"ray_actors", "ray_cluster_active_nodes", "ray_node_cpu_utilization", "ray_node_mem_total", "ray_node_mem_used"}
NOT_HERE = {"ray_node_gpus_utilization", "ray_cluster_pending_nodes"}


def scraped():
    """Name and labels → value, of one node."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_run(samples, run):
    """Short name, stage or reason → value."""
    found = {}
    for (name, labels), value in samples.items():
        labels = dict(labels)
        if labels.get("run") == run:
            found[name.removeprefix("ray_tokenclean_"), labels.get("stage") or labels.get("reason", "")] = value
    return found


def test_a_run_is_counted_and_the_dashboard_shows_what_is_counted(tmp_path, model_pair, ray_session):
    rows = some_rows(40)
    rows[3] = {"messages": []}
    record = rounds.clean(config_for(tmp_path, model_pair, rows, score={"num_actors": 1}))
    run = record["config"]["output"]
    wait_for(lambda: ("kept_share", "") in of_run(scraped(), run))  # nodes are told every few seconds
    samples = scraped()
    found = of_run(samples, run)
    counts, threshold = record["counts"], record["threshold"]
    assert found["rows_total", "encode"] == found["rows_total", "score"] == 39
    assert found["tokens_total", "score"] == found["tokens_wanted", "score"] == counts["tokens"]
    assert found["parts_total", "score"] == found["parts_done", "score"] == found["parts_wanted", "score"] > 1
    assert found["rows_total", "mask"] == counts["masked"]
    assert found["kept_share", ""] == threshold["kept"] / threshold["tokens"]
    assert found["rejected_rows", "messages is empty"] == 1
    assert found["load_seconds_count", ""] == 1

    dashboard = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bray_\w+", target["expr"])
    }
    there = {name for name, _ in samples}
    never_here = {"ray_tokenclean_drift", "ray_tokenclean_retries_total"}  # set where they arise
    assert asked - there - NOT_HERE <= never_here
    assert {name for name in asked if "tokenclean" not in name} == RAY | NOT_HERE
    shown = {re.sub(r"_(total|bucket)$", "", name) for name in asked if "tokenclean" in name}
    counted = {f"ray_tokenclean_{metric.info['name'].removeprefix('tokenclean_')}" for metric in metrics.ALL}
    assert shown == counted - {"ray_tokenclean_parts"}
