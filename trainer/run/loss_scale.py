"""The loss scale of fp16: what DeepSpeed does with it at every ZeRO stage, in one form.

fp16 has 5 bits of exponent, so the loss is multiplied by a scale S before the backward pass and the gradients are divided by it afterwards. Where a
gradient overflows at S, DeepSpeed takes no step and halves S; after `loss_scale_window` steps without overflow it doubles S.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class LossScale:
    """The loss scale of an engine that trains in fp16; of any other it does nothing, and `value` is None."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._is_active = bool(engine.fp16_enabled())

    @property
    def value(self) -> float | None:
        """S in force."""
        return float(self._engine.optimizer.loss_scale) if self._is_active else None

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss`, whose backward pass begins with S at every stage.

        DeepSpeed (0.19) divides gradients by S at stage 0 too, and multiplies the loss by it only at stages 1 to 3. Setting the gradient, in place of
        multiplying, stays right where a version does both.
        """
        scale = self.value
        if scale is not None and not self._is_zero() and loss.requires_grad:
            loss.register_hook(lambda gradient: torch.full_like(gradient, scale))  # type: ignore[no-untyped-call]
        return loss

    def overflowed(self) -> bool:
        """Whether the engine's last step found a gradient that was not finite, and so moved nothing; the same on every rank."""
        return self._is_active and bool(self._engine.optimizer.overflow)

    def can_fall(self, scale: float | None) -> bool:
        """Whether an overflow at `scale` is cured by a smaller one; one that is fixed, or at its least, stays as it is."""
        if not self._is_active or scale is None:
            return False
        scaler = self._scaler()
        if not getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)):
            return False
        least = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None) or 1.0
        return scale > float(least)

    def gradient_norm(self, scale: float | None) -> float | None:
        """The L2 norm of the last step's gradient, which was made with `scale`.

        DeepSpeed (0.19) leaves S in it at stage 0, and at stage 3 divides by the S that is in force after the step.
        """
        norm = self._engine.get_global_grad_norm()
        if norm is None or not self._is_active or scale is None:
            return None if norm is None else float(norm)
        kind = type(self._engine.optimizer).__name__
        if kind == "FP16_UnfusedOptimizer":
            return float(norm) / scale
        if kind in ("FP16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"):
            return float(norm) * (self.value or 1.0) / scale
        return float(norm)

    def prepare(self) -> None:
        """Before a step: an overflow at the least scale is no bare exception, see :meth:`can_fall`."""
        if self._is_active and hasattr(scaler := self._scaler(), "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """What steps inside the block find out about the scale is forgotten at its end."""
        if not self._is_active:
            yield
            return
        self.prepare()
        scaler, optimizer = self._scaler(), self._engine.optimizer
        before, overflow = dict(vars(scaler)), optimizer.overflow
        try:
            yield
        finally:
            vars(scaler).update(before)
            optimizer.overflow = overflow

    def _scaler(self) -> Any:
        """What holds S and the counters around it; another object after a checkpoint was loaded."""
        optimizer = self._engine.optimizer
        return optimizer.loss_scaler if self._is_zero() else optimizer.loss_scale_config

    def _is_zero(self) -> bool:
        """Whether the optimizer is one of ZeRO's, which scales the loss itself."""
        return hasattr(self._engine.optimizer, "loss_scaler")
