"""The order of samples, against what it must be by counting."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from trainer.data.sampling import (
    GROUP_COST,
    MOST_GROUPS,
    GlobalBatchSampler,
    Limits,
    Sizes,
    all_micro_batches,
    dropped_modalities,
    group,
    largest_micro_batch,
    micro_batches,
)


def lengths(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, n)


@pytest.mark.parametrize("n", [1, 7, 32, 33, 1000])
def test_an_epoch_holds_every_sample_once(n: int) -> None:
    order = GlobalBatchSampler({"meld": lengths(n)}, global_batch=8, seed=3)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [i for step in steps for i in order.step(step).indices]
        assert sorted(seen) == list(range(n))
        assert {order.step(step).epoch for step in steps} == {epoch}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order, again, other = (GlobalBatchSampler({"meld": lengths(500)}, global_batch=16, seed=s) for s in (1, 1, 2))
    last = order.steps_per_epoch * 3
    assert [again.step(s) for s in reversed(range(last))][::-1] == [order.step(s) for s in range(last)]
    assert [other.step(s).indices for s in range(5)] != [order.step(s).indices for s in range(5)]
    first, second = ([order.step(e * order.steps_per_epoch + s).indices for s in range(5)] for e in (0, 1))
    assert first != second


def test_like_lengths_stand_together() -> None:
    n = lengths(4096)
    order = GlobalBatchSampler({"meld": n}, global_batch=32, seed=0)
    bucketed = sum(n[list(order.step(s).indices)].max() * 32 for s in range(order.steps_per_epoch))
    shuffled = np.random.default_rng(0).permutation(n).reshape(-1, 32).max(1).sum() * 32
    assert n.sum() <= bucketed < 1.15 * n.sum() < shuffled


def test_tasks_share_the_steps_by_weight_and_finish_their_passes() -> None:
    sizes = {"meld": 640, "cherma": 160}
    order = GlobalBatchSampler(
        {t: lengths(n) for t, n in sizes.items()}, global_batch=16, seed=0, weights={"meld": 1, "cherma": 1}
    )
    epochs = 4
    batches = [order.step(s) for s in range(order.steps_per_epoch * epochs)]
    shares = Counter(b.task for b in batches)
    assert shares == {"meld": 25 * epochs, "cherma": 25 * epochs}
    used = Counter(i for b in batches if b.task == "cherma" for i in b.indices)
    assert set(used) == set(range(160))
    assert set(used.values()) == {epochs * 25 * 16 // 160}  # ten whole passes
    assert all(len({order.step(s).task}) == 1 for s in range(10))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, (64, 4)), (2.0, (54.4, 13.6)), (np.inf, (34, 34))])
def test_the_mixing_temperature_evens_out_the_shares(temperature: float, expected: tuple[float, float]) -> None:
    """Shares of 68 steps: 1,024 and 64 samples to the power of 1 / T are as 16, 4 and 1 to 1."""
    order = GlobalBatchSampler({"a": lengths(1024), "b": lengths(64)}, global_batch=16, seed=0, temperature=temperature)
    shares = Counter(order.step(s).task for s in range(order.steps_per_epoch))
    assert (shares["a"], shares["b"]) == pytest.approx(expected, abs=0.5)


def sizes(n: int, seed: int = 0, prefix: int = 20) -> Sizes:
    rng = np.random.default_rng(seed)
    return Sizes(prefix, rng.integers(5, 60, n), rng.integers(0, 300, (n, 3)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 16, 31])
def test_micro_batches_do_not_know_the_world(n: int, world: int, packed: bool) -> None:
    batch = tuple(range(100, 100 + n))
    held, limits = sizes(200), Limits(256, 7, packed)
    ranks = [micro_batches(batch, held, limits, rank, world) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1  # the ranks keep in step, and so do their calls of the fusion network
    assert all(len({len(m.groups) for m in together}) == 1 for together in zip(*ranks, strict=True))
    real = {m.indices for r in ranks for m in r if m.weight}
    assert real == {m.indices for m in micro_batches(batch, held, limits, 0, 1)}
    assert sorted(i for cut in real for i in cut) == list(batch)
    assert all(len(m.indices) == 1 for r in ranks for m in r if not m.weight)
    assert all(sum(m.groups) == len(m.indices) for r in ranks for m in r)


@pytest.mark.parametrize("samples", [None, 3])
def test_rows_are_filled_first_fit_within_their_budget(samples: int | None) -> None:
    held = sizes(60, seed=4)
    order = np.random.default_rng(1).permutation(60).tolist()
    got = micro_batches(order, held, Limits(150, samples), 0, 1)
    rows: list[list[int]] = []
    for i in order:  # by hand: the first row with room
        for row in rows:
            if 20 + held.tokens_N[[*row, i]].sum() <= 150 and len(row) < (samples or 99):
                row.append(i)
                break
        else:
            rows.append([i])
    assert [sorted(m.indices) for m in got] == [sorted(row) for row in rows]
    alone = micro_batches(order[:3], held, Limits(10), 0, 1)  # longer than the budget: each in a row of its own
    assert [m.indices for m in alone] == [(i,) for i in order[:3]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "budget"), [(1, 256), (16, 256), (31, 512), (64, 4096), (64, 10)])
def test_without_a_limit_every_rank_gets_as_much_as_the_others(n: int, budget: int, world: int, packed: bool) -> None:
    """The fewest rows that have room, by hand: a row for each rank, more only where the samples do not fit."""
    held = sizes(200)
    batch = np.random.default_rng(2).permutation(200)[:n].tolist()
    limits = Limits(budget, packed=packed, even=True)
    ranks = [micro_batches(batch, held, limits, rank, world) for rank in range(world)]
    every = all_micro_batches(batch, held, limits, world)
    assert len({len(r) for r in ranks}) == 1
    real = [m.indices for r in ranks for m in r if m.weight]
    assert sorted(real) == sorted(m.indices for m in every)
    assert sorted(i for cut in real for i in cut) == sorted(batch)
    assert all(sum(m.groups) == len(m.indices) for m in every)
    largest = [largest_micro_batch(np.argsort(-held.tokens_N)[:n].tolist(), held, limits, world)]
    held_by = [held.positions(m.indices, packed) for m in every]
    if packed:
        assert max(held_by) <= max(held.positions(m.indices, packed) for m in largest)
        tokens = [int(held.tokens_N[list(m.indices)].sum()) for m in every]
        if n >= world:
            assert len(every) % world == 0 or budget == 10
            assert max(tokens) - min(tokens) <= int(held.tokens_N[batch].max())  # or one could be moved
        fewest = -(-int(held.tokens_N[batch].sum()) // max(budget - held.prefix, 1))
        rows = -(-len(every) // world)
        assert rows == 1 or rows <= -(-fewest // world) + 1 or budget == 10
    assert all(len(m.indices) == 1 or held.positions(m.indices, packed) <= budget for m in every)
    if not packed:
        assert max(len(m.indices) for m in every) <= -(-n // world)


def test_a_gpu_reads_a_row_in_one_group_where_a_cpu_reads_it_in_several() -> None:
    held = Sizes(20, np.full(40, 30), np.repeat([[10, 500, 100], [5, 20, 4]], 20, axis=0))
    (on_cpu,) = micro_batches(range(40), held, Limits(4096, even=True), 0, 1)
    (on_gpu,) = micro_batches(range(40), held, Limits(4096, even=True, group_cost=GROUP_COST["cuda"]), 0, 1)
    assert (on_cpu.groups, on_gpu.groups) == ((20, 20), (40,))
    assert on_cpu.indices == on_gpu.indices


def test_padded_batches_stay_within_their_budget() -> None:
    held = sizes(60, seed=4)
    got = micro_batches(range(60), held, Limits(400, 6, packed=False), 0, 1)
    assert [i for m in got for i in m.indices] == list(range(60))
    whole = [len(m.indices) * (20 + held.tokens_N[list(m.indices)].max()) for m in got]
    assert max(whole) <= 400
    for m, following in itertools.pairwise(got):  # none could have taken the next sample too
        grown = [*m.indices, following.indices[0]]
        assert len(grown) > 6 or len(grown) * (20 + held.tokens_N[grown].max()) > 400


def cost(read_n3: np.ndarray, groups: list[int]) -> int:
    stops = np.cumsum(groups)
    parts = [read_n3[stop - n : stop] for n, stop in zip(groups, stops, strict=True)]
    return sum(len(part) * np.maximum(part, 1).max(0).sum() + GROUP_COST["cpu"] for part in parts)


@pytest.mark.parametrize("seed", range(6))
def test_groups_waste_least(seed: int) -> None:
    """Against every way to cut nine sorted samples into at most four groups."""
    rng = np.random.default_rng(seed)
    read_N3 = rng.integers(0, 500 if seed % 2 else 60, (30, 3))
    indices = rng.permutation(30)[:9].tolist()
    chosen, groups = group(indices, read_N3)
    assert sorted(chosen) == sorted(indices)
    held = read_N3[list(chosen)]
    assert (np.diff(held.sum(1)) <= 0).all()
    best = min(
        cost(held, np.diff([0, *cuts, 9]).tolist())
        for count in range(MOST_GROUPS)
        for cuts in itertools.combinations(range(1, 9), count)
    )
    assert cost(held, list(groups)) == best


def test_a_short_clip_is_not_padded_to_a_long_one() -> None:
    read_N3 = np.array([[5, 40, 40]] * 12 + [[5, 500, 500]])
    assert group(range(13), read_N3)[1] == (1, 12)


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"meld has no training samples.*names mled"):
        GlobalBatchSampler({"meld": np.zeros(0)}, global_batch=4, seed=0, weights={"mled": 1})


def test_dropped_modalities_have_the_rate_and_do_not_depend_on_order() -> None:
    draws = [dropped_modalities(0.3, 5, epoch, f"s{i}") for epoch in range(4) for i in range(1000)]
    for name in ("audio", "video"):
        share = np.mean([name in d for d in draws])
        assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(draws))
    assert dropped_modalities(0.3, 5, 2, "s7") == draws[2007]
    assert dropped_modalities(0.0, 5, 2, "s7") == set()
