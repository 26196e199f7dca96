"""The same bits on a GPU: which algorithms torch, cuBLAS, cuDNN and flash-attention may take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (
    ":4096:8",
    ":16:8",
)  # with which cuBLAS repeats its sums (NVIDIA, cuBLAS library, results reproducibility)
FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # of transformers, where a model attends through flash-attn by itself
NVLS = "NCCL_NVLS_ENABLE"  # sums inside the switch, whose order is not known


def set_variables() -> None:
    """Set what libraries read when they are first used, in a process that is to train deterministically: before it joins the others.
    What the user has set stays."""
    os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    os.environ.setdefault(NVLS, "0")


@contextlib.contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """Inside the block, if `on`, every operator gives the same bits in every run on the same devices, or raises.

    What torch then does: attention's backward passes add in one order, sums over repeated indices (of embeddings, answer trees, prefixes)
    sort first, cuDNN does not try algorithms out. Our Triton kernels add nothing by atomics and are the same either way.
    On a CPU nothing changes: its operators are deterministic for a number of threads.

    Raises:
        ValueError: `CUBLAS_WORKSPACE_CONFIG` is set to something with which cuBLAS does not repeat.
    """
    if not on:
        yield
        return
    given = os.environ.get(WORKSPACE)
    if given is not None and given not in WORKSPACES:
        raise ValueError(
            f"train.deterministic=true needs {WORKSPACE}={WORKSPACES[0]} (or {WORKSPACES[1]}), and it is {given!r}: unset it"
        )
    from torch.utils import deterministic

    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    variables = {name: os.environ.get(name) for name in (WORKSPACE, FLASH)}
    os.environ[WORKSPACE] = given or WORKSPACES[0]  # cuBLAS reads it when it is first used
    os.environ[FLASH] = "1"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[2:4]
        deterministic.fill_uninitialized_memory = before[4]  # type: ignore[attr-defined]
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
