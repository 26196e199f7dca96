"""Random generators: seeds from several numbers, and the state of every generator of a process as tensors.

The generators are torch's (CPU and this rank's GPU), numpy's and Python's.
Module dropout does not need the state (the loop seeds every micro-batch); whatever else draws numbers between two steps does.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """The generators' states now."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    version, words, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([place, has_gauss, gauss], dtype=torch.float64),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.rest": torch.tensor(
            [version, python_gauss is not None, python_gauss or 0.0],
            dtype=torch.float64,
        ),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Restore what :func:`random_state` returned; a GPU's state only on a GPU."""
    torch.set_rng_state(state["torch"])
    place, has_gauss, gauss = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), gauss))
    version, has_python_gauss, python_gauss = state["python.rest"].tolist()
    words = tuple(state["python.words"].tolist())
    random.setstate((int(version), words, python_gauss if has_python_gauss else None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_seed(*numbers: int) -> int:
    """A seed of 64 bits for torch from several numbers, by numpy's SeedSequence."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
