"""Where scoring runs. What the stages compute: test_rounds."""

from types import SimpleNamespace

import pytest

from tokenclean_ray import run, score_actors
from tokenclean_ray.config import Score
from tokenclean_ray.layout import Store
from tokenclean_ray.models import ModelSpec
from tokenclean_ray.score_actors import is_little_work, pool_size

MB = 1 << 20


@pytest.mark.parametrize(
    ("score", "sizes", "tokens", "little"),
    [
        ({}, [1 * MB, 1 * MB], 100_000, True),
        ({}, [1 * MB, 1 * MB], 1_000_000, False),
        ({}, [0.01 * MB], 1_000_000, True),
        ({}, [0.01 * MB], 10_000_000, False),  # tokens cost something by themselves
        ({}, [100 * MB], 1000, True),
        ({}, [200 * MB, 100 * MB], 1, False),  # the driver's memory
        ({}, [1 * MB, 0], 1000, False),  # a model of the hub, of any size
        ({"num_actors": 1}, [1 * MB], 1000, False),
        ({"num_actors": (1, 2)}, [1 * MB], 1000, False),
        ({"backend": "vllm"}, [1 * MB], 1000, False),
    ],
)
def test_seconds_of_work_are_for_the_driver_unless_actors_are_asked_for(score, sizes, tokens, little):
    assert is_little_work(Score(**score), sizes, tokens) is little


@pytest.mark.parametrize(
    ("memory", "model", "parts", "actors"),
    [
        (64, 1, 100, 8),
        (64, 4, 100, 4),  # float32 weights are twice as large as their files, and take half of the memory at most
        (64, 40, 100, 1),
        (64, 1, 3, 3),
    ],
)
def test_actors_on_cpus_leave_half_of_the_memory(monkeypatch, memory, model, parts, actors):
    monkeypatch.setattr(score_actors.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {}}])
    monkeypatch.setattr(score_actors.ray, "cluster_resources", lambda: {"memory": memory * 1024.0 * MB})
    assert pool_size(Score(), False, parts, model * 1024 * MB) == (actors, actors)


@pytest.mark.parametrize(
    ("colocate", "gigabytes", "gpus", "passes"),
    [
        ("auto", (11, 12), 1, 1),
        ("auto", (13, 12), 1, 2),
        ("auto", (13, 12), 2, 1),
        (True, (90, 90), 1, 1),
        (False, (1, 1), 1, 2),
    ],
)
def test_models_are_held_together_where_they_fit(monkeypatch, colocate, gigabytes, gpus, passes):
    found = []
    monkeypatch.setattr(score_actors, "score_parts", lambda store, members, *_: found.append(members) or [])
    models = {f"losses/{n}": ModelSpec(str(n), None, "x", 9, size << 30, None) for n, size in enumerate(gigabytes)}
    score = Score(colocate=colocate, gpus_per_actor=gpus)
    config = SimpleNamespace(score=score)
    this = SimpleNamespace(
        config=config, gpu=True, dtype="bfloat16", record={"timings": {}}, store=Store("memory://none"),
        time=lambda *_: None,
    )  # fmt: skip
    run.score(this, models, {"part": {"tokens": 5}})
    assert len(found) == passes
    assert sorted(folder for members in found for _, folder in members) == sorted(models)


@pytest.mark.parametrize(
    ("score", "waits"),
    [
        ({"cpus_per_actor": 8}, False),
        ({"cpus_per_actor": 9}, True),
        ({"label_selector": {"market": "spot"}}, False),
        ({"label_selector": {"market": "spotty"}}, True),
        ({"label_selector": {"market": "!on-demand", "zone": "in(a, b)"}}, False),
    ],
)
def test_actors_that_no_node_can_hold_are_waited_for_aloud(monkeypatch, capsys, score, waits):
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {"market": "spot", "zone": "a"}}]
    monkeypatch.setattr(score_actors.ray, "nodes", lambda: nodes)
    assert pool_size(Score(num_actors=(1, 4), **score), False, 9, MB) == (1, 4)
    assert ("waiting for one" in capsys.readouterr().err) == waits
