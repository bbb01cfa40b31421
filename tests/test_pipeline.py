"""What the stages send to the tasks of a cluster."""

import ray.cloudpickle

from tokenclean_ray import pipeline
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
