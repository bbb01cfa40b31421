"""What the stages send to the tasks of a cluster."""

import numpy as np
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
