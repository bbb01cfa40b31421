"""Micro-batches: every row once, within the budget, little padding."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenclean_ray.batching import pad, plan_batches


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    budget=st.integers(1, 200),
    data=st.data(),
)
def test_every_row_once_within_the_budget(lengths, budget, data):
    lengths = np.array(lengths, np.int64)
    groups = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))), np.int64)
    batches = plan_batches(lengths, budget, groups)
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert len(set(groups[batch])) == 1


def test_padding_waste_is_small():
    lengths = np.random.default_rng(0).integers(40, 400, 2000)
    batches = plan_batches(lengths, 4096)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded / lengths.sum() < 1.03


def work(batches, lengths, budget, shortest):
    return sum(max(shortest, len(b) * int(lengths[b].max())) + budget // 64 for b in batches)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9),
    budget=st.integers(1, 1024),
    shortest=st.integers(0, 600),
)
def test_no_cut_of_the_sorted_rows_is_less_work(lengths, budget, shortest):
    lengths = np.array(lengths)
    order = np.argsort(lengths)
    cuts = itertools.product((False, True), repeat=len(lengths) - 1)
    plans = [np.split(order, np.flatnonzero(cut) + 1) for cut in cuts]
    allowed = [plan for plan in plans if all(len(b) == 1 or len(b) * lengths[b].max() <= budget for b in plan)]
    least = min(work(plan, lengths, budget, shortest) for plan in allowed)
    assert work(plan_batches(lengths, budget, least=shortest), lengths, budget, shortest) == least


def test_few_rows_of_many_lengths_are_hardly_padded():
    lengths = np.random.default_rng(0).normal(160, 45, 48).astype(int).clip(20)  # an update's
    batches = plan_batches(lengths, 2048)
    assert sum(len(b) * lengths[b].max() for b in batches) / lengths.sum() < 1.03
    assert sum(lengths[b].sum() >= 256 for b in batches) >= len(batches) - 2  # the shortest and the longest stand alone
    assert len(batches) <= 11


def test_pad():
    flat = np.array([1, 2, 3, 4, 5, 6], np.int32)
    assert pad(flat, np.array([3, 0]), np.array([1, 3])).tolist() == [[4, 0, 0], [1, 2, 3]]
