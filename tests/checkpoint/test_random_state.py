"""Seeds made of several numbers."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from trainer.checkpoint.random_state import derive_seed


def test_seeds_are_those_of_numpy_and_none_comes_twice() -> None:
    """Of (seed, step, micro-step, rank): swapped and neighbouring numbers give other seeds, which torch takes."""
    seeds = {numbers: derive_seed(*numbers) for numbers in itertools.product(range(6), repeat=4)}
    assert len(set(seeds.values())) == len(seeds)
    low, high = (int(word) for word in np.random.SeedSequence([3, 1, 4, 1]).generate_state(2, np.uint32))
    assert seeds[3, 1, 4, 1] == low + (high << 32)
    torch.manual_seed(max(seeds.values()))
