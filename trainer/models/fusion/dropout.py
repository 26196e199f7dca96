"""Dropout with cheap random numbers on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

STEPS = 1 << 16  # a random number has 16 bits


class Dropout(nn.Dropout):
    """``nn.Dropout``; on CPUs four elements share a random number of 64 bits, and the probability is rounded to 1 / 65,536.

    Drawing a number for each element takes longer there than all else that is done with it.
    """

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return values
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return dropout(values, self.p)
        dropped = min(round(self.p * STEPS), STEPS - 1)
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
        kept = bits[: values.numel()].view(values.shape) >= dropped - STEPS // 2
        return values * kept.to(values.dtype).mul_(STEPS / (STEPS - dropped))
