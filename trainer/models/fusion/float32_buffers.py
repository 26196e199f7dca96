"""Buffers that keep their precision when a model is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own floating buffers stay float32 whatever its parameters are cast to.

    ``module.bfloat16()`` and ``module.half()``, which DeepSpeed calls, cast every floating buffer. Moves between devices
    are followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self
