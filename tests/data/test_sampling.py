"""The order of samples, against what it must be by counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainer.data.sampling import GlobalBatch, Order, hidden_modalities, micro_batches


def lengths(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, n)


@pytest.mark.parametrize("n", [1, 7, 32, 33, 1000])
def test_an_epoch_holds_every_sample_once(n: int) -> None:
    order = Order({"meld": lengths(n)}, global_batch=8, seed=3)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [i for step in steps for i in order.step(step).indices]
        assert sorted(seen) == list(range(n))
        assert {order.step(step).epoch for step in steps} == {epoch}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order, again, other = (Order({"meld": lengths(500)}, global_batch=16, seed=s) for s in (1, 1, 2))
    last = order.steps_per_epoch * 3
    assert [again.step(s) for s in reversed(range(last))][::-1] == [order.step(s) for s in range(last)]
    assert [other.step(s).indices for s in range(5)] != [order.step(s).indices for s in range(5)]
    first, second = ([order.step(e * order.steps_per_epoch + s).indices for s in range(5)] for e in (0, 1))
    assert first != second


def test_like_lengths_stand_together() -> None:
    n = lengths(4096)
    order = Order({"meld": n}, global_batch=32, seed=0)
    bucketed = sum(n[list(order.step(s).indices)].max() * 32 for s in range(order.steps_per_epoch))
    shuffled = np.random.default_rng(0).permutation(n).reshape(-1, 32).max(1).sum() * 32
    assert n.sum() <= bucketed < 1.15 * n.sum() < shuffled


def test_tasks_share_the_steps_by_weight_and_finish_their_passes() -> None:
    sizes = {"meld": 640, "cherma": 160}
    order = Order({t: lengths(n) for t, n in sizes.items()}, global_batch=16, seed=0, weights={"meld": 1, "cherma": 1})
    epochs = 4
    batches = [order.step(s) for s in range(order.steps_per_epoch * epochs)]
    shares = Counter(b.task for b in batches)
    assert shares == {"meld": 25 * epochs, "cherma": 25 * epochs}
    used = Counter(i for b in batches if b.task == "cherma" for i in b.indices)
    assert set(used) == set(range(160))
    assert set(used.values()) == {epochs * 25 * 16 // 160}  # ten whole passes
    assert all(len({order.step(s).task}) == 1 for s in range(10))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 16, 31])
def test_micro_batches_do_not_know_the_world(n: int, world: int) -> None:
    batch = GlobalBatch("meld", 0, tuple(range(100, 100 + n)))
    ranks = [micro_batches(batch, 4, rank, world) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1  # the ranks keep in step
    real = {m.indices for r in ranks for m in r if m.weight}
    assert real == {m.indices for m in micro_batches(batch, 4, 0, 1)}
    assert sorted(i for cut in real for i in cut) == list(batch.indices)
    assert all(len(m.indices) == 1 for r in ranks for m in r if not m.weight)


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"meld has no training samples.*names mled"):
        Order({"meld": np.zeros(0)}, global_batch=4, seed=0, weights={"mled": 1})


def test_hidden_modalities_have_the_rate_and_do_not_depend_on_order() -> None:
    draws = [hidden_modalities(0.3, 5, epoch, f"s{i}") for epoch in range(4) for i in range(1000)]
    for name in ("audio", "video"):
        share = np.mean([name in d for d in draws])
        assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(draws))
    assert hidden_modalities(0.3, 5, 2, "s7") == draws[2007]
    assert hidden_modalities(0.0, 5, 2, "s7") == set()
