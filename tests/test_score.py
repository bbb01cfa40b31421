"""A scoring worker with too little memory: a real limit on a process of its own."""

import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, make_llama, run_python, save

from tokenclean_ray.layout import Store
from tokenclean_ray.run import _notes

LIMITED = """
import json, resource, sys
import pyarrow
pyarrow.set_cpu_count(1)  # the stacks of its threads take from the room, and how many it starts depends on the load
pyarrow.set_io_thread_count(1)
import torch
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.models import describe
from tokenclean_ray.score import PartScorer
store, model, room = Store(sys.argv[1]), describe(sys.argv[2]), int(sys.argv[3])
scorer = PartScorer(store, [(model, "losses/m")], "float32", Score(), gpu=False)
(now,) = [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize")]
resource.setrlimit(resource.RLIMIT_AS, (now + (room << 20), resource.RLIM_INFINITY))
try:
    print(json.dumps(scorer.score("part-a", ["losses/m"])))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""
WIDE = {"hidden_size": 32, "intermediate_size": 16384, "num_hidden_layers": 1}  # a token's activations: 64 KiB a matrix


@pytest.fixture
def case(tmp_path, tokenizer):
    """A store with one encoded part of 24 rows, 256 tokens each but for the last, and a model of wide activations."""
    model = make_llama(0, scale=2.0, **WIDE)
    generator = np.random.default_rng(0)
    lengths = [256] * 23 + [500]
    rows = {
        "row": pa.array(range(24), pa.int32()),
        "input_ids": pa.array([generator.integers(4, 400, n).tolist() for n in lengths], pa.list_(pa.int32())),
        "response_mask": pa.array([[False] * 8 + [True] * (n - 8) for n in lengths], pa.list_(pa.bool_())),
    }
    store = Store(str(tmp_path / "run"))
    store.write_part("encoded", "part-a", pa.table(rows), {"rows": 24})
    return store, save(tmp_path / "model", model, tokenizer)


def score_with(room, case):
    """The result of a process that has so many MiB left once its model is loaded."""
    store, model = case
    # one arena: glibc reserves 64 MiB of addresses for every thread's
    environment = {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "ATEN_CPU_CAPABILITY": "avx2"}
    return json.loads(run_python(LIMITED, store.url, model, str(room), **environment))


def test_the_budget_is_halved_until_the_part_fits(case):
    whole = score_with(4000, case)
    assert whole == {"rows": 24, "full_logits": [], "lowered": {}}
    store, _ = case
    losses = store.read_part("losses/m", "part-a")
    assert store.read_summary("losses/m", "part-a")["batch_tokens"] == 2048
    store.delete("losses/m/part-a.parquet")
    less = score_with(350, case)
    budget = less["lowered"]["losses/m"]
    assert budget in (2048, 1024, 512)
    assert _notes(whole) == []
    assert _notes(less) == [
        f"losses/m: out of memory, so parts are scored again with a budget of {budget} tokens; to spare the attempt "
        f"set score.batch_tokens={budget}"
    ]
    assert store.read_summary("losses/m", "part-a")["batch_tokens"] == budget
    lowered = store.read_part("losses/m", "part-a")
    assert lowered["row"].equals(losses["row"])
    one, other = (np.concatenate(table["loss"].to_numpy()) for table in (losses, lowered))
    np.testing.assert_allclose(one, other, atol=1e-4)
    store.delete("losses/m/part-a.parquet")
    score_with(350, case)
    assert store.read_part("losses/m", "part-a").equals(lowered)


def test_no_room_for_a_single_row_is_one_line(case):
    error = score_with(80, case)["error"]
    assert "part-a, losses/m runs out of memory with one row of 500 tokens: lower data.max_length" in error
    assert "\n" not in error
    assert case[0].part_names("losses/m") == set()
