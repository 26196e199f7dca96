"""The DeepSpeed engine of a run: its configuration derived from ours, its optimizer, its schedule, its weights.

We own the accumulation boundary: a step's micro-batches are counted by the loop, and their losses are scaled so that
DeepSpeed's mean over ranks is the weighted mean over the global batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import get_scheduler

from trainer.config import RunConfig, TrainConfig
from trainer.distributed.world import World, missing_build_tools
from trainer.logs import captured_stdout
from trainer.models.egmf import EGMF

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; the raw ``deepspeed`` section is laid over it, key by key."""
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero}
    if train.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch or 1,  # it must be something; we count our own
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
    }
    if train.precision == "bf16" and train.zero in (1, 2):
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = OmegaConf.to_container(OmegaConf.merge(derived, config.deepspeed))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage in force, raw overrides included."""
    return int(deepspeed_config(config)["zero_optimization"].get("stage", 0))


def dtype_of(config: RunConfig) -> torch.dtype:
    """The training dtype in force, raw overrides included."""
    raw = deepspeed_config(config)
    for name in ("bf16", "fp16"):
        if raw[name].get("enabled"):
            return DTYPES[name]
    return torch.float32


def check_machine(config: RunConfig, device: torch.device) -> None:
    """Refuse what this machine cannot train, all of it at once.

    Raises:
        ValueError: fp16 on a CPU (DeepSpeed has no such path); an optimizer in host memory without what compiles it;
            combinations that docs/clusters.md names as refused.
    """
    faults = _refused(config)
    if dtype_of(config) is torch.float16 and device.type == "cpu":
        faults.append("train.precision=fp16 needs a GPU: on a CPU use train.precision=fp32 or bf16")
    if _offloads(deepspeed_config(config)) and (missing := missing_build_tools()):
        faults.append(
            f"train.offload=cpu compiles DeepSpeed's CPU Adam, and there is no {' and no '.join(missing)} on PATH: "
            "install it (apt-get install g++ python3-dev), or use train.offload=none"
        )
    if faults:
        raise ValueError("\n".join(faults))


def _refused(config: RunConfig) -> list[str]:
    """Combinations of stage, quantisation and offload that do not work together, each with what to do."""
    zero, stage, faults = deepspeed_config(config)["zero_optimization"], zero_stage(config), []
    where = (zero.get("offload_param") or {}).get("device", "none")
    packed = config.model.backbone.quantization != "none"
    if _offloads(deepspeed_config(config)) and stage == 0:
        faults.append("an optimizer in host memory needs ZeRO: use train.zero=1, 2 or 3, or train.offload=none")
    if where != "none" and stage != 3:
        faults.append(f"deepspeed.zero_optimization.offload_param needs train.zero=3, not {stage}")
    if where == "nvme":
        faults.append(
            "deepspeed.zero_optimization.offload_param.device=nvme is not supported: its buffers hold the training dtype "
            "and not packed weights; use cpu"
        )
    if config.model.fusion.compile and stage == 3:
        faults.append(
            "model.fusion.compile=true does not go with train.zero=3, whose hooks gather weights layer by layer"
        )
    if zero.get("mics_shard_size", -1) > 0:
        faults.append("deepspeed.zero_optimization.mics_shard_size is not supported: weights are cut over all ranks")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if packed and zero.get(key):
            faults.append(
                f"deepspeed.zero_optimization.{key} would quantise the packed weights of "
                f"model.backbone.quantization={config.model.backbone.quantization} again: leave one of the two out"
            )
    return faults


def build_engine(model: EGMF, config: RunConfig) -> deepspeed.DeepSpeedEngine:
    """The engine that trains `model`; its learning rates are the loop's to set (:class:`Schedule`)."""
    raw = deepspeed_config(config)
    groups = model.parameter_groups(config.train.lr.fusion, config.train.lr.backbone, config.train.weight_decay)
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
        self._engine, self._ours = engine, engine.lr_scheduler is None
        self._base = [group["lr"] for group in engine.optimizer.param_groups]
        name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self._factor: Callable[[int], float] = get_scheduler(
            name, nothing, round(train.warmup * steps), steps
        ).lr_lambdas[0]

    def set(self, step: int) -> None:
        """Have the rates of step `step` (from 0) in the optimizer."""
        groups = self._engine.optimizer.param_groups if self._ours else []  # new ones after every load
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


def _optimizer(groups: list[dict[str, Any]], train: TrainConfig, raw: dict[str, Any]) -> torch.optim.Optimizer:
    if _offloads(raw):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=train.betas, adamw_mode=True)
    return torch.optim.AdamW(groups, betas=train.betas, fused=torch.cuda.is_available())


def _offloads(raw: dict[str, Any]) -> bool:
    return (raw["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters are whole on every rank, whatever the ZeRO stage; writes by rank 0 are kept."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        yield


def trainable_state(model: EGMF, world: World) -> dict[str, Tensor]:
    """The trainable weights and the gate's usage, whole and on the CPU, on rank 0; an empty dictionary elsewhere."""
    state: dict[str, Tensor] = {}
    with gathered([p for p in model.parameters() if p.requires_grad]):
        if world.first:
            state = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in model.trainable_state().items()}
    return state


def load_trainable_state(model: EGMF, state: dict[str, Tensor], world: World) -> None:
    """Put `state` (the same on every rank) into `model`, partitioned or not.

    Raises:
        ValueError: the weights are not those of this model.
    """
    with gathered([p for p in model.parameters() if p.requires_grad]):
        model.load_trainable_state(state)
