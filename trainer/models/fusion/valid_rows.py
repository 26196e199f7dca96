"""Frames without their padding, for layers that treat every frame by itself.

Shapes: B samples, T time, D width, N valid frames of all samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Pack(torch.autograd.Function):
    """Rows by distinct indices; the gradient goes back to their places by a copy, where index_select would add row by row."""

    @staticmethod
    def forward(ctx: Any, values_nD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.rows = len(values_nD)
        return values_nD.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return gradient_ND.new_zeros(ctx.rows, gradient_ND.shape[1]).index_copy_(0, index_N, gradient_ND), None


class ValidRows:
    """The valid frames of padded values: :meth:`pack` takes them out, :meth:`pad` puts them back between zeros.

    Only on CPUs: how many frames are valid decides about shapes, for which a GPU would have to wait, and a compiled graph would be cut. Elsewhere,
    and where there is no padding, all frames are packed, in the same order.
    """

    def __init__(self, mask_BT: Tensor) -> None:
        self.shape = mask_BT.shape
        self.index_N: Tensor | None = None
        readable = type(mask_BT) is Tensor  # fake tensors, of a plan or an export, have no values
        if readable and mask_BT.device.type == "cpu" and not torch.compiler.is_compiling():
            index_N = torch.from_numpy(np.flatnonzero(mask_BT.numpy()))
            self.index_N = index_N if len(index_N) < mask_BT.numel() else None

    def pack(self, values_BTD: Tensor) -> Tensor:
        """`[B, T, D]` to `[N, D]`."""
        values_nD = values_BTD.flatten(0, 1)
        return values_nD if self.index_N is None else _Pack.apply(values_nD, self.index_N)

    def pad(self, values_ND: Tensor) -> Tensor:
        """`[N, D]` to `[B, T, D]`."""
        if self.index_N is not None:
            nothing_nD = values_ND.new_zeros(self.shape.numel(), values_ND.shape[1])
            values_ND = nothing_nD.index_copy(0, self.index_N, values_ND)
        return values_ND.unflatten(0, self.shape)
