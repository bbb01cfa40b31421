"""Sums over sources. What a part's tokens are and which are kept: test_rounds, against the oracle."""

import random

from tokenclean_ray.tokens import MANY, MOST_SOURCES, add_sources


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
