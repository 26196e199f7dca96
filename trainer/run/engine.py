"""The DeepSpeed engine of a run: its configuration derived from the run's, its optimizer, its schedule, its weights.

We own the accumulation boundary: a step's micro-batches are counted by the loop, and their losses are scaled so that
DeepSpeed's mean over ranks is the weighted mean over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import deepspeed
import torch
from torch import Tensor
from transformers import get_scheduler

from trainer.config import RunConfig, TrainConfig
from trainer.distributed.compiled_ops import compile_cpu_adam
from trainer.distributed.deepspeed_config import deepspeed_config, offloads_optimizer
from trainer.logs import captured_stdout
from trainer.models.egmf import EGMF
from trainer.models.optimizer_groups import ParameterGroup, parameter_groups


def build_engine(model: EGMF, config: RunConfig) -> deepspeed.DeepSpeedEngine:
    """The engine that trains `model`; its learning rates are the loop's to set (:class:`Schedule`)."""
    raw = deepspeed_config(config)
    groups = parameter_groups(model, config.train.lr.fusion, config.train.lr.backbone, config.train.weight_decay)
    arguments: dict[str, Any] = {}
    if "optimizer" not in raw:
        arguments["optimizer"] = _optimizer(groups, config.train, raw)
    with captured_stdout():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=raw, **arguments)
    _undo_first_step(engine)
    return engine


def _undo_first_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Count from 0: some of DeepSpeed's wrappers take a step of zero gradients to allocate Adam's state (stage 0 in bf16,
    deepspeed 0.19), which leaves its bias correction one step ahead for ever, and weights that have decayed once."""
    taken = False
    for state in engine.basic_optimizer.state.values():
        step = state.get("step", 0)
        taken = taken or int(step) > 0
        if isinstance(step, Tensor):
            step.zero_()
        elif step:
            state["step"] = 0
    if taken and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


class Schedule:
    """Learning rates as a function of the step alone: the same on all ranks, after a skipped step and after a resume.

    With a ``scheduler`` in the raw ``deepspeed`` section DeepSpeed's own is in force, and this does nothing.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, train: TrainConfig, steps: int) -> None:
        self._engine, self._is_set_here = engine, engine.lr_scheduler is None
        self._base = [group["lr"] for group in engine.optimizer.param_groups]
        name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self._factor: Callable[[int], float] = get_scheduler(
            name, unused, round(train.warmup * steps), steps
        ).lr_lambdas[0]

    def set(self, step: int) -> None:
        """Put the rates of step `step` (from 0) into the optimizer."""
        groups = self._engine.optimizer.param_groups if self._is_set_here else []  # other objects after every load
        for group, base in zip(groups, self._base, strict=bool(groups)):
            group["lr"] = base * self._factor(step)


def build_inference_engine(model: EGMF, config: RunConfig) -> deepspeed.DeepSpeedEngine:
    """The model partitioned by ZeRO-3, without an optimizer: evaluation of what one GPU cannot hold."""
    raw = deepspeed_config(config)
    raw.pop("optimizer", None)
    raw.pop("scheduler", None)
    zero = dict(raw["zero_optimization"], stage=3)
    zero.pop("offload_optimizer", None)
    with captured_stdout():
        engine, *_ = deepspeed.initialize(model=model, config={**raw, "zero_optimization": zero})
    return engine


def _optimizer(groups: list[ParameterGroup], train: TrainConfig, raw: dict[str, Any]) -> torch.optim.Optimizer:
    if offloads_optimizer(raw):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        compile_cpu_adam()
        return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, betas=train.betas, adamw_mode=True))
    return torch.optim.AdamW(cast(list[dict[str, Any]], groups), betas=train.betas, fused=torch.cuda.is_available())
