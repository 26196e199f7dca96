"""DeepSpeed's configuration derived from the run's, the effective values in it, and the combinations that are refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from trainer.config import RunConfig
from trainer.distributed.compiled_ops import missing_build_tools
from trainer.distributed.world import World

log = logging.getLogger(__name__)

UNSHARDED_ALONE = ("cuda",)  # types of devices of which one alone trains at stage 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALING = {
    # 2^8 in place of DeepSpeed's 2^16, at which gradients above 1 overflow: of those that clipping at norm 1 leaves to some 40 million weights (1.6e-4 on average)
    # elements down to 2.4e-7 keep their full precision, down to 2.3e-10 some of it; the scale doubles every 1,000 steps that allow it
    "initial_scale_power": 8,
    "hysteresis": 1,  # the first overflow halves the scale, as stage 0 does: with 2 another step is lost to the same scale
}
ZERO_DEFAULTS = {  # elements; what DeepSpeed takes where `zero_optimization` does not say
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; the raw ``deepspeed`` section is laid over it, key by key."""
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero}
    if train.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch
        or 1,  # required, not used: the run accumulates gradients itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
    }
    if accumulates_fp32(train.zero, DTYPES[train.precision]):
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = OmegaConf.to_container(OmegaConf.merge(derived, config.deepspeed))
    assert isinstance(merged, dict)
    if merged["fp16"].get("enabled"):
        merged["fp16"] = {**LOSS_SCALING, **merged["fp16"]}
    return {str(key): value for key, value in merged.items()}


def accumulates_fp32(stage: int, dtype: torch.dtype) -> bool:
    """Whether gradients are kept and summed in fp32 although training is in half precision."""
    return dtype is torch.bfloat16 and stage in (1, 2)


def zero_elements(zero: Mapping[str, Any], key: str) -> int:
    """A size or threshold of the `zero_optimization` section, in elements; DeepSpeed's default where it does not say."""
    return int(float(zero.get(key, ZERO_DEFAULTS[key])))


def for_world(config: RunConfig, world: World, saved: int | None) -> RunConfig:
    """The config as this world trains it. One GPU has nothing to shard, and the hooks of ZeRO 1 and 2 cost the host time in every
    micro-step: it trains at stage 0, unless the optimizer is offloaded or `deepspeed.zero_optimization` is written out. A run that is
    continued keeps the stage of its checkpoint, `saved`.
    """
    train = config.train
    if (
        train.zero not in (1, 2)
        or offloads_optimizer(deepspeed_config(config))
        or "zero_optimization" in config.deepspeed
    ):
        return config
    alone = world.size == 1 and world.device.type in UNSHARDED_ALONE
    stage = saved if saved in (0, train.zero) else 0 if alone else train.zero
    if stage == train.zero:
        return config
    if world.is_rank_zero:
        why = "as its checkpoint was" if saved is not None else "since one GPU has nothing to shard"
        log.info("train.zero=%d: trained at stage 0, %s", train.zero, why)
    return config.model_copy(update={"train": train.model_copy(update={"zero": stage})})


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage in force, raw overrides included."""
    return int(deepspeed_config(config)["zero_optimization"].get("stage", 0))


def slow_precision(config: RunConfig, device: torch.device) -> str | None:
    """Why bf16 is slow on this processor, and what to set instead; None where it is not, or is not used."""
    if config.train.precision != "bf16" or device.type != "cpu":
        return None
    instructions = torch.backends.cpu.get_cpu_capability()
    if not instructions.startswith(("AVX", "DEFAULT")):  # of another kind than Intel's and AMD's
        return None
    if instructions.startswith("AVX512") and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)():
        return None
    times = "2 times with AVX-512" if instructions.startswith("AVX512") else "15 times with AVX2"
    return (
        "train.precision=bf16 is slow on this processor, which has no instructions for it (a training step took "
        f"{times} of that in fp32): set train.precision=fp32"
    )


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
            combinations that docs/clusters.md names as refused; kernels that train.deterministic cannot repeat.
    """
    faults = _refused(config)
    if dtype_of(config) is torch.float16 and device.type == "cpu":
        faults.append("train.precision=fp16 needs a GPU: on a CPU use train.precision=fp32 or bf16")
    if config.train.deterministic and device.type == "cuda":
        for key, chosen in {
            "model.backbone.attention=flex": config.model.backbone.attention == "flex",
            "model.fusion.compile=true": config.model.fusion.compile,
        }.items():
            if chosen:
                faults.append(
                    f"train.deterministic=true does not go with {key}, whose compiled kernels are chosen by timing: leave one of the two out"
                )
    if offloads_optimizer(deepspeed_config(config)) and (missing := missing_build_tools()):
        faults.append(
            f"train.offload=cpu compiles DeepSpeed's CPU Adam, and there is no {' and no '.join(missing)} on PATH: "
            "install it (apt-get install g++ python3-dev), or use train.offload=none"
        )
    if faults:
        raise ValueError("\n".join(faults))


def _refused(config: RunConfig) -> list[str]:
    """Combinations of stage, quantisation and offload that do not work together, each with what to do."""
    zero, stage, faults = deepspeed_config(config)["zero_optimization"], zero_stage(config), offload_faults(config)
    where = (zero.get("offload_param") or {}).get("device", "none")
    packed = config.model.backbone.quantization != "none"
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
        faults.append(
            "deepspeed.zero_optimization.mics_shard_size is not supported: weights are partitioned over all ranks"
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if packed and zero.get(key):
            faults.append(
                f"deepspeed.zero_optimization.{key} would quantise the packed weights of "
                f"model.backbone.quantization={config.model.backbone.quantization} again: leave one of the two out"
            )
    return faults


def offload_faults(config: RunConfig) -> list[str]:
    """Why the optimizer cannot be offloaded as the config asks, with what to do; empty where it can be, or need not be."""
    if offloads_optimizer(deepspeed_config(config)) and zero_stage(config) == 0:
        return ["an optimizer in host memory needs ZeRO: use train.zero=1, 2 or 3, or train.offload=none"]
    return []


def offloads_optimizer(raw: dict[str, Any]) -> bool:
    """Whether DeepSpeed's configuration keeps the optimizer in host memory, or further away."""
    device: str = (raw["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    return device != "none"
