"""What the stages send to the tasks of a cluster."""

import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import ray.cloudpickle

from tokenclean_ray import pipeline, selection
from tokenclean_ray.layout import Store


def test_what_each_task_is_sent_does_not_name_all_parts(tmp_path, monkeypatch):
    """A task is sent its items and the function, which are tens of megabytes where that knows every part."""
    sent = []
    monkeypatch.setattr(pipeline, "map_each", lambda items, function, **_: sent.append((items, function)) or iter(()))
    monkeypatch.setattr(pipeline, "_summaries", lambda *_: iter(()))
    origin = {f"part-{n:016x}": (1 + n % 2, f"selections/round-{n % 2}") for n in range(1000)}
    assert not list(pipeline.copy_rounds(Store(str(tmp_path)), "masked/v0001", origin))
    assert [item for items, _ in sent for item in items] == [[part, *of] for part, of in origin.items()]
    assert all(len(ray.cloudpickle.dumps(function)) < 3000 for _, function in sent)


def test_what_workers_find_adds_up_as_in_one_process(monkeypatch):
    """Groups of any name, histograms of nothing, no places, and the last place that there is."""
    monkeypatch.setattr(pipeline, "few_blocks", lambda: 3)
    span = (0, 2**96 - 1)

    def look(n):
        counts = np.zeros(1 << 16, np.int64)
        counts[[0, n, 65535]] = [1, 2**40, n]
        places = np.array([[n, 2**64 - 1]], np.uint64)[: n % 2]
        return {("'\"\\\0é", (1, 2)): counts, (f"s{n}", ()): counts * 0}, {("", span): places}

    counts, places = pipeline.add_up([1, 2, 3], look, 2)
    wanted, _ = selection.add_up(map(look, [1, 2, 3]))
    assert counts.keys() == wanted.keys()
    for key, histogram in wanted.items():
        np.testing.assert_array_equal(counts[key], histogram)
    assert sorted(places["", span].tolist()) == [[1, 2**64 - 1], [3, 2**64 - 1]]


@pytest.mark.usefixtures("ray_session")
def test_what_an_attempt_has_made_before_it_died_is_not_made_again(tmp_path):
    """A snapshot's part of many files, of which the first is there when its worker is killed."""
    store, driver = Store(str(tmp_path)), os.getpid()

    def make(part, round):
        summary = {"part": part, "round": round, "again": (made := tmp_path / f"made-{part}").exists()}
        made.touch()
        store.write_part("masked/v0001", part, pa.table({"row": [0]}), summary)
        if part == "part-2" and not summary["again"]:
            assert os.getpid() != driver
            os.kill(os.getpid(), signal.SIGKILL)
        return summary

    parts = [f"part-{n}" for n in range(6)]
    found = list(pipeline._commit_parts(store, "masked/v0001", [[part, 3] for part in parts], make))
    assert sorted(summary["part"] for summary in found) == parts
    assert {summary["round"] for summary in found} == {3}
    assert not any(summary["again"] for summary in found)
