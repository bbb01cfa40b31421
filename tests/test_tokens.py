"""Sums over sources, random scores. What a part's tokens are and which are kept: test_rounds, against the oracle."""

import random

import numpy as np
from conftest import write_scored

from tokenclean_ray.config import Select
from tokenclean_ray.layout import Store
from tokenclean_ray.tokens import MANY, MOST_SOURCES, add_sources, part_tokens


def test_random_scores_are_uniform_and_follow_the_seed(tmp_path):
    store = Store(str(tmp_path))
    write_scored(store, "part-00000000000000aa", [[5] * 41] * 100, [[False] + [True] * 40] * 100)

    def scores(seed):
        return part_tokens(store, "part-00000000000000aa", {}, Select(scorer="random", seed=seed)).score

    one, other = scores(0), scores(1)
    np.testing.assert_array_equal(one, scores(0))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
    for found in (one, other):
        assert np.histogram(found, 4, (0, 1))[0].min() > 900


def test_sources_are_summed_by_name_while_they_are_few():
    assert add_sources({"a": [3, 1]}, {"a": [2, 2], "b": [1, 0]}) == {"a": [5, 3], "b": [1, 0]}
    whole = {str(n): [1, 0] for n in range(MOST_SOURCES)}
    assert add_sources({}, whole) == whole


def test_too_many_sources_are_one_whatever_the_order():
    parts = [{f"{part}-{n}": [n, part] for n in range(MOST_SOURCES // 3)} for part in range(6)]
    for seed in range(3):
        random.Random(seed).shuffle(parts)
        total = {}
        for part in parts:
            total = add_sources(total, part)
        assert total == {MANY: [6 * sum(range(MOST_SOURCES // 3)), MOST_SOURCES // 3 * sum(range(6))]}
