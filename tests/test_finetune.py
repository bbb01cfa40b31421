"""Updates, schedule and the loss of one update."""

import numpy as np
import pytest
import torch
from conftest import make_llama

from tokenclean_ray.config import Train
from tokenclean_ray.finetune import (
    IGNORED,
    Rows,
    backward,
    deal,
    fit,
    learning_rate_at,
    make_optimizer,
    plan_updates,
    train_steps,
)
from tokenclean_ray.token_loss import TokenLoss


def make_rows(count=20):
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        ids = rng.integers(3, 400, rng.integers(4, 20)).astype(np.int32)
        pairs.append((ids, np.where(rng.random(len(ids)) < 0.5, ids, IGNORED).astype(np.int32)))
    return pairs, Rows.of(pairs)


def trained_plainly(model, pairs, settings):
    """AdamW, a linear schedule and clipping by torch's own, row by row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    updates = plan_updates(len(pairs), settings.batch_rows, settings.epochs, 0)
    warmup, steps = round(settings.warmup_ratio * len(updates)), len(updates)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    for update in updates:
        kept = sum((pairs[row][1][1:] != IGNORED).sum() for row in update)
        for row in update:
            ids, labels = (torch.tensor(flat[None].astype(np.int64)) for flat in pairs[row])
            logits = model(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum")
            (losses / kept).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_weights_are_those_of_a_plain_loop():
    pairs, rows = make_rows(20)
    settings = Train(
        learning_rate=1e-3, epochs=2, batch_rows=6, warmup_ratio=0.3, max_grad_norm=0.05, activation_checkpointing=False
    )
    start, ours, plain = (make_llama(0, scale=3.0) for _ in range(3))
    fit(TokenLoss(ours), rows, settings)
    trained_plainly(plain, pairs, settings)
    flat = [torch.cat([weight.detach().flatten() for weight in model.parameters()]) for model in (start, ours, plain)]
    assert (flat[2] - flat[0]).norm() > 0.1
    assert (flat[1] - flat[2]).norm() < 1e-5


def test_every_row_once_an_epoch_in_a_seeded_order():
    updates = plan_updates(50, 12, 3, seed=1)
    assert [len(u) for u in updates] == [12, 12, 12, 12, 2] * 3
    epochs = [np.concatenate(updates[i : i + 5]) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert all(np.array_equal(a, b) for a, b in zip(updates, plan_updates(50, 12, 3, seed=1), strict=True))
    assert not np.array_equal(updates[0], plan_updates(50, 12, 3, seed=2)[0])


def test_the_schedule_rises_and_falls_linearly():
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10:] == pytest.approx((100 - np.arange(10, 100)) / 90)


def test_deal_gives_every_row_to_one_rank():
    _, rows = make_rows()
    update = np.array([3, 7, 1, 19, 4])
    for ranks in (1, 2, 7):
        dealt = deal(rows.lengths, update, ranks)
        assert sorted(np.concatenate(dealt).tolist()) == [1, 3, 4, 7, 19]
        assert len(dealt) == ranks
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_the_gradient_is_of_the_mean_over_kept_tokens():
    """Against one padded batch, full logits and torch's own cross-entropy."""
    pairs, rows = make_rows(6)
    model = make_llama(0)
    width = max(len(i) for i, _ in pairs)
    ids = torch.zeros(6, width, dtype=torch.int64)
    labels = torch.full((6, width), IGNORED)
    for n, (i, k) in enumerate(pairs):
        ids[n, : len(i)], labels[n, : len(k)] = torch.tensor(i), torch.tensor(k)
    logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 400), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    loss_of = TokenLoss(model)
    settings = Train(batch_tokens=25)
    share = backward(loss_of, rows, np.arange(6), settings, [0], 0, 1)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert share == pytest.approx(loss.item(), abs=1e-5)
    # two ranks by hand: sharding averages their gradients
    model.zero_grad()
    shares = [backward(loss_of, rows, np.arange(6), settings, [0], rank, 2) for rank in (0, 1)]
    found = torch.cat([p.grad.flatten() for p in model.parameters()]) / 2
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert sum(shares) == pytest.approx(loss.item(), abs=1e-5)


def test_rows_beyond_the_context_change_no_other_rows_gradient():
    """Dynamic RoPE changes a whole batch by its longest row, and remembers it."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

    def fresh():
        return make_llama(0, scale=3.0, max_position_embeddings=12, rope_parameters=rope)

    pairs, rows = make_rows(12)
    assert {len(i) > 12 for i, _ in pairs} == {True, False}
    expected = 0
    for row in range(12):
        loss_of = TokenLoss(fresh())
        ids_BT, target_BT = rows.batch(np.array([row]))
        (loss_of(ids_BT, target_BT).sum() / rows.kept.sum()).backward()
        expected += torch.cat([p.grad.flatten() for p in loss_of.model.parameters()])
    loss_of = TokenLoss(fresh())
    for _ in range(2):  # the second remembers the first
        loss_of.zero_grad()
        backward(loss_of, rows, np.arange(12), Train(batch_tokens=2048), [0], 0, 1)
    found = torch.cat([p.grad.flatten() for p in loss_of.model.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_dropout_differs_by_step_rank_and_pass_and_is_the_same_again():
    _, rows = make_rows(12)
    settings = Train(batch_rows=6, batch_tokens=25, epochs=2)

    def seeds(seed=0, rank=0, first_step=0):
        """What the generator began with in each pass."""
        loss_of, found = TokenLoss(make_llama()), []
        loss_of.model.get_input_embeddings().register_forward_pre_hook(lambda *_: found.append(torch.initial_seed()))
        steps = train_steps(
            loss_of,
            make_optimizer(loss_of, settings),
            rows,
            settings,
            seed=seed,
            first_step=first_step,
            rank=rank,
            ranks=2,
        )
        assert len(list(steps)) == 4 - first_step
        return found

    every = [*seeds(), *seeds(rank=1), *seeds(seed=1)]
    assert len(set(every)) == len(every) > 3 * 4
    assert seeds() == every[: len(seeds())]
    resumed = seeds(first_step=2)
    assert resumed == seeds()[-len(resumed) :]


def test_rows_without_kept_tokens_count_nothing():
    ids = np.arange(5, 11, dtype=np.int32)
    masked = np.full(6, IGNORED, np.int32)
    only_first = masked.copy()
    only_first[0] = 5
    rows = Rows.of([(ids, masked), (ids, only_first), (ids, ids)])
    assert rows.kept.tolist() == [0, 0, 5]
    model = make_llama(0)
    before = model.lm_head.weight.clone()
    assert fit(TokenLoss(model), rows.take(np.array([0, 1])), Train(learning_rate=1.0)) == []
    assert torch.equal(model.lm_head.weight, before)
    assert len(fit(TokenLoss(model), rows, Train(learning_rate=1e-3))) == 1


def test_fit_learns():
    _, rows = make_rows(8)
    model = make_llama(0)
    curve = fit(TokenLoss(model), rows, Train(learning_rate=1e-2, epochs=30, batch_rows=4))
    assert len(curve) == 60
    assert curve[-1] < 0.1 * curve[0]
