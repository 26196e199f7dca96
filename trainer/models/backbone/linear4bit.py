"""The 4-bit linear layer of a frozen backbone; its weight may be whole, or partitioned over the ranks by ZeRO-3."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor


class FrozenLinear4bit(Linear4bit):
    """bitsandbytes' layer, which keeps nothing of a gathered weight after its forward pass.

    On CPUs with AVX512-BF16 the original repacks its weight in the first evaluation, after which gradients are wrong:
    that is off here.
    """

    @classmethod
    def adopt(cls, layer: Linear4bit) -> None:
        """Turn a layer of bitsandbytes' class into one of this class, in place."""
        layer.__class__ = cls
        layer.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _FrozenMatmul.apply(x.to(dtype), self.weight, bias).to(x.dtype)


class _FrozenMatmul(torch.autograd.Function):
    """`y = x Wᵀ + b`, gradients for x only.

    bitsandbytes saves a view of the packed weight for the backward pass. Under ZeRO-3 that view keeps the gathered weight
    alive, and after a forward pass every rank would hold the whole model. The parameter itself holds nothing while it is
    partitioned, and DeepSpeed gathers it again before the layer's backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Params4bit, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return bnb.matmul_4bit(x, weight.data.t(), quant_state=weight.quant_state, bias=bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        packed = ctx.weight.data
        if packed.numel() == 0:
            raise RuntimeError("a 4-bit weight is not gathered in the backward pass")
        weight = bnb.functional.dequantize_4bit(packed, ctx.weight.quant_state).to(gradient.dtype)
        return gradient @ weight, None, None
