"""What is measured of a frozen weight while it is whole: a hash of what is stored, and the length of embeddings.

Under ZeRO-3 no rank holds whole weights after loading, so the loader measures each one as it passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Measured:
    """`parts`: (name below the weight's, dtype, shape, sha256) of each stored tensor; of 4-bit weights the scales too."""

    parts: tuple[tuple[str, str, tuple[int, ...], str], ...]
    row_norm_V: Tensor | None = None  # L2 norms of an embedding's rows, float32


def measure(parameter: nn.Parameter, *, rows: bool = False) -> Measured:
    """Measure a whole weight; `rows` asks for the norms of its rows."""
    stored = [("", parameter.data)]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        stored += [(f".{key}", value) for key, value in sorted(state.as_dict(packed=True).items())]
    parts = tuple((name, str(t.dtype), tuple(t.shape), _digest(t)) for name, t in stored)
    return Measured(parts, row_norms(parameter.data) if rows else None)


def fingerprint(weights: Iterable[tuple[str, Measured]]) -> str:
    """sha256 over names, dtypes, shapes and bytes of weights, in their order."""
    total = hashlib.sha256()
    for name, measured in weights:
        for below, dtype, shape, digest in measured.parts:
            total.update(f"{name}{below} {dtype} {shape} {digest}\n".encode())
    return total.hexdigest()


def row_norms(weight_VH: Tensor) -> Tensor:
    """L2 norm of every row, float32, in blocks: no second copy of the table."""
    return torch.cat([block.float().norm(dim=1) for block in weight_VH.detach().split(8192)])


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
