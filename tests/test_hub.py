"""What the hub says of models, by the files that their repositories have. With a server and its cache: test_models."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from tokenclean_ray.hub import hub_model

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "size", "by_commit"),
    [
        ([*SHARDS, "consolidated.safetensors", "original/model.safetensors"], 20, False),
        (["model.safetensors", *SHARDS], 10, False),
        (["consolidated.safetensors"], 10, True),
        (["pytorch_model.bin"], 0, True),
        (["of no known content/", "model.safetensors"], 10, True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_fingerprint_and_size_are_of_the_weights_that_are_loaded(monkeypatch, names, size, by_commit):
    blob = None if "of no known content/" in names else "b"
    files = [SimpleNamespace(rfilename=n, size=10, lfs=None, blob_id=blob) for n in ["config.json", *names]]
    info = SimpleNamespace(sha="c" * 40, siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    revision, fingerprint, found = hub_model("owner/name", False)
    assert (revision, found) == ("c" * 40, size)
    assert (fingerprint == "c" * 16) == by_commit
    assert hub_model("owner/name", True)[1] == "c" * 16
    files[1].blob_id = "other"
    assert (hub_model("owner/name", False)[1] == fingerprint) == by_commit
