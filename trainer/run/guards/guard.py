"""Non-finite losses and gradients are found, and their step is skipped.

DeepSpeed's own checks differ between ZeRO stages and precisions (deepspeed 0.19: stage 0 in fp32 and stages 1 and 2 in
bf16 have none), so one decision is made for all ranks before the step, and it works the same at every stage: the whole
step runs, but its optimizer does not move. The schedule and the order of samples go on as if it had. Overflows of fp16's
loss scaling are another thing (:mod:`trainer.run.loss_scale`): the schedule waits for them.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.checkpoint.state import LossMonitorState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


HELD = 2**25  # elements of gradients that are kept for one look at all of them


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Guard:
    """Watches the local gradients of trainable parameters, and can freeze the optimizer.

    Args:
        engine: its trainable parameters are watched, its optimizer's step is wrapped.
        gradients: watch gradients too; off for fp16, where DeepSpeed's loss scaling expects some to overflow.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device, *, gradients: bool) -> None:
        self._sum = torch.zeros((), device=device)
        self._watched: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        self._elements = 0
        self._frozen = False
        if gradients:
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)
        optimizer = engine.basic_optimizer
        step = optimizer.step

        def guarded(*arguments: Any, **keywords: Any) -> Any:
            return None if self._frozen else step(*arguments, **keywords)

        optimizer.step = guarded

    def _watch(self, gradient: Tensor) -> None:
        """Keep a gradient to be looked at with many others: a kernel for each would be hundreds in a micro-step."""
        if not gradient.numel():
            return
        self._watched[gradient.dtype].append(gradient.detach())
        self._elements += gradient.numel()
        if self._elements > HELD:
            self._look()

    def _look(self) -> None:
        """Add 0 to the sum, or nan where any element of the gradients that are kept is inf or nan."""
        for gradients in self._watched.values():
            largest = torch.stack(torch._foreach_norm(gradients, float("inf")))  # nan if any element is
            self._sum += largest.sum(dtype=torch.float32) * 0.0
        self._watched.clear()
        self._elements = 0

    def found(self) -> Tensor:
        """Whether a local gradient since the last call held inf or nan (1 or 0, on the device)."""
        self._look()
        bad = torch.isfinite(self._sum).logical_not().double()
        self._sum.zero_()
        return bad

    @contextlib.contextmanager
    def freeze_optimizer(self, frozen: bool) -> Iterator[None]:
        """Inside the block the optimizer does not move, if `frozen`."""
        self._frozen = frozen
        try:
            yield
        finally:
            self._frozen = False


class LossMonitor:
    """Counts skipped steps, those that overflowed at a loss scale, and losses far above the recent ones. Part of a checkpoint.

    A loss is a spike when it exceeds median + `factor` · 1.4826 · MAD of the last `WINDOW` losses (of `LEAST` or more).
    The deviation counts as `FLOOR` at least: small fluctuations near zero are not flagged.
    """

    WINDOW, LEAST, FLOOR = 64, 16, 0.01

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.skipped = self.in_a_row = self.spikes = self.overflowed = 0
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def step(self, loss: float, skipped: bool, overflowed: bool = False) -> bool:
        """Count a step; whether its loss is a spike."""
        if overflowed:
            self.overflowed += 1
            return False
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        spike = False
        if len(self._recent) >= self.LEAST:
            recent = torch.tensor(list(self._recent), dtype=torch.float64)
            median = recent.quantile(0.5)
            spread = 1.4826 * (recent - median).abs().quantile(0.5)
            spike = loss > float(median + self.factor * spread.clamp_min(self.FLOOR))
        self.spikes += spike
        self._recent.append(loss)
        return spike

    def state(self) -> LossMonitorState:
        return LossMonitorState(
            skipped=self.skipped,
            in_a_row=self.in_a_row,
            spikes=self.spikes,
            recent=list(self._recent),
            overflowed=self.overflowed,
        )

    def restore(self, state: LossMonitorState) -> None:
        self.skipped, self.in_a_row, self.spikes = state.skipped, state.in_a_row, state.spikes
        self.overflowed = state.overflowed
        self._recent.extend(state.recent)
