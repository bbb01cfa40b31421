"""The clean rows of `evolve`: which are the warm-up, which judge its rounds, and what it says where there are few."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import chat, write_rows
from test_rounds import some_rows

from tokenclean_ray import rounds
from tokenclean_ray.config_file import build_config
from tokenclean_ray.loop import plan_rounds
from tokenclean_ray.parts import Splits
from tokenclean_ray.run import encode, open_run

pytestmark = pytest.mark.usefixtures("ray_session")

SUBSETS = ("0of3.0", "1of3.0", "2of3.0")


@pytest.fixture
def clean_rows(tmp_path, model_pair, capfd):
    """Prompts of the warm-up and of the held-out rows, the subsets that the warm-up is of, and what was said."""

    def take(reference=None, evolve=None, **data):
        data["path"] = some_rows(30)
        paths = {name: rows and write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in data.items()}
        values = {"output": str(tmp_path / "run"), "data": paths, "evolve": {"num_subsets": 3} | (evolve or {})}
        config = build_config(values | {"model": {"base": model_pair[0], "reference": reference}}, "evolve")
        with open_run(config, "evolve") as run:
            pool = encode(run, run.config.data.path, Splits(SUBSETS, (1 / 3,) * 3, 0))
            capfd.readouterr()
            found = rounds._clean_rows(run, pool, SUBSETS)

            def prompts(parts):
                rows = [row for part in parts for row in run.store.read_part("encoded", part).to_pylist()]
                return [json.dumps(row["input_ids"][: np.argmax(row["response_mask"])]) for row in rows]

            warmup, held_out = map(prompts, found)
        of_pool = {summary["split"] for part, summary in found[0].items() if part in pool}
        told = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("plan ", "encode "))]
        return SimpleNamespace(warmup=warmup, held_out=held_out, of_pool=of_pool, told=told, config=config)

    return take


def test_a_share_of_the_warm_up_set_is_held_out_and_its_prompts_are_not_trained_on(clean_rows):
    rows = [chat(f"what is {n % 40} plus 2", "the fox") for n in range(120)]
    found = clean_rows(warmup=rows, evolve={"held_out_share": 0.3})
    assert len(found.warmup) + len(found.held_out) == 120
    assert 15 < len(found.held_out) < 60
    assert not set(found.warmup) & set(found.held_out)
    assert found.told == []


def test_held_out_rows_of_their_own_leave_the_warm_up_set_whole(clean_rows):
    found = clean_rows(warmup=some_rows(20, seed=1), held_out=some_rows(12, seed=2))
    assert (len(found.warmup), len(found.held_out), found.told) == (20, 12, [])


def test_few_held_out_rows_are_warned_of(clean_rows):
    found = clean_rows(warmup=some_rows(20, seed=1), held_out=some_rows(9, seed=2))
    assert [line[:66] for line in found.told] == ["warning: 9 held-out rows say little of a round: give more data.hel"]
    found = clean_rows(warmup=some_rows(20, seed=1), held_out=some_rows(9, seed=2), evolve={"guard": False})
    assert found.told == []


def test_without_a_warm_up_set_subset_0_is_the_warm_up_and_no_round_selects_from_it(clean_rows):
    found = clean_rows(held_out=some_rows(12, seed=2))
    assert found.of_pool == {SUBSETS[0]}
    assert not any(0 in one.subsets for one in plan_rounds(found.config))
    assert [line.partition(":")[2][:55] for line in found.told] == [
        " no data.warmup, so subset 0 of the pool is the warm-up"
    ]


def test_a_reference_that_is_given_learns_no_noise(clean_rows, model_pair):
    assert clean_rows(held_out=some_rows(12, seed=2), reference=model_pair[1]).told == []


OFF = "the guard is off: no clean rows to judge a round by; give data.held_out, or more rows as data.warmup"


def test_without_clean_rows_the_guard_is_off_and_says_so(clean_rows, model_pair):
    few = [chat(f"what is {n} plus 2", "the fox") for n in range(4)]
    found = clean_rows(warmup=few)  # no prompt of which falls into the share
    assert (len(found.warmup), found.held_out, found.told) == (4, [], [OFF])
    assert clean_rows(reference=model_pair[1]).told == [OFF]
    assert clean_rows(reference=model_pair[1], evolve={"guard": False}).told == []
