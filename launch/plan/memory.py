"""What a rank holds and sends at each ZeRO stage, as DeepSpeed 0.19 lays it out.

Words: weights of W trainable elements in a training dtype of b bytes, N ranks; *half* is bf16 or fp16 training (b = 2).

    stage   weights   fp32 master   Adam's moments   gradients                     sent per rank and step (ring)
    0       b W       4 W if half   8 W              b W                           2 b W (N-1)/N
    1       b W       4 W / N       8 W / N          b W (bf16: 4 W)               3 b W (N-1)/N
    2       b W       4 W / N       8 W / N          b W / N (bf16: 4 W / N)       3 b W (N-1)/N
    3       b W / N   4 W / N       8 W / N          b W / N                       b W (N-1)/N, and what is gathered:
                                                                                   all weights once or twice a micro-step

DeepSpeed's stages 1 and 2 reduce a bucket by an all-reduce, twice the volume of the paper's reduce-scatter; stage 2 does so
at every micro-step. Stage 1 in bf16 reduces fp32 gradients. Frozen weights are whole on each rank below stage 3.

Sources: Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054; deepspeed/runtime/zero/stage_1_and_2.py, stage3.py,
bf16_optimizer.py, fp16/unfused_optimizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

from launch.plan.recorded_pass import Pass
from launch.plan.weights import Weights
from trainer.distributed.deepspeed_config import accumulates_fp32, zero_elements

ALL_REDUCE_AT_ONCE = 500_000_000  # elements; fixed in DeepSpeed's engine, stage 0 and stage 1 in bf16


class ZeroSection(TypedDict, total=False):
    """What a plan reads of DeepSpeed's `zero_optimization` section; sizes and thresholds in elements."""

    reduce_bucket_size: float
    stage3_prefetch_bucket_size: float
    stage3_param_persistence_threshold: float
    stage3_max_reuse_distance: float
    overlap_comm: bool


@dataclass(frozen=True)
class Setting:
    """What a plan is made for. With `touched` only the written part of a buffer counts (CPUs); GPUs reserve it whole."""

    stage: int
    offload: bool
    ranks: int
    dtype: torch.dtype
    micro_steps: float  # of the fullest rank in an optimizer step, the mean
    zero: ZeroSection
    touched: bool = False

    @property
    def size(self) -> int:
        """Bytes of an element in training."""
        return self.dtype.itemsize

    @property
    def half(self) -> bool:
        return self.dtype is not torch.float32

    @property
    def gradient_size(self) -> int:
        """Bytes of an element of the accumulated gradients."""
        return 4 if accumulates_fp32(self.stage, self.dtype) else self.size

    @property
    def fp32_reduction(self) -> bool:
        """Stage 1 in bf16 runs DeepSpeed's bf16 optimizer, which reduces its fp32 gradients once a step."""
        return self.stage == 1 and accumulates_fp32(self.stage, self.dtype)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by what they are: on its device, at the fullest moment, and on the host (optimizer offload)."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def rank_memory(weights: Weights, work: Pass, setting: Setting) -> Memory:
    """The memory of the fullest rank at the fuller of two moments: inside a micro-batch, and at the optimizer's step."""
    W, b, N, stage = weights.trainable, setting.size, setting.ranks, setting.stage
    share = N if stage else 1
    device = _weights(weights, setting)
    states = {
        "fp32 master weights": _up(4 * W, share) if stage or setting.half else 0,
        "Adam's moments": _up(8 * W, share),
    }
    gradients, bucket = _gradients(weights, setting), _bucket(weights, setting)
    host = {}
    if setting.offload:
        host = {**states, "gradients": _up(4 * W, share), "weights in training dtype": _up(b * W, share)}
    else:
        device.update(states)
    # inside a micro-batch: gradients of earlier ones are there, those of this one come as activations go
    standing = stage == 3 or setting.fp32_reduction
    earlier = gradients if setting.micro_steps > 1 or standing else 0
    inside = {
        "activations": work.peak if earlier and stage < 2 else work.peak_with_gradients,
        "gradients": earlier,
        "buckets": bucket if stage == 3 or (stage and not setting.touched and not standing) else 0,
        "gathered weights": _gathered(weights, setting),
    }
    step = {
        "gradients": gradients,
        "buckets": bucket if stage in (0, 3) or standing else 0,
        "optimizer's step": 0 if setting.offload else _step(weights, setting),
    }
    fuller = max((inside, step), key=lambda moment: sum(moment.values()))
    return Memory({name: size for name, size in {**device, **fuller}.items() if size}, host)


def _weights(weights: Weights, setting: Setting) -> dict[str, int]:
    cut = setting.ranks if setting.stage == 3 else 1
    persistent = weights.persistent_bytes if setting.stage == 3 and cut > 1 else 0
    return {
        "frozen weights": _up(weights.dense_bytes, cut),
        "4-bit weights": _up(weights.packed_bytes, cut),
        "scales of 4-bit weights": weights.scale_bytes,
        "trainable weights": _up(setting.size * weights.trainable, cut),
        "small weights kept whole": persistent,
        "buffers": weights.buffer_bytes,
    }


def _gradients(weights: Weights, setting: Setting) -> int:
    return _up(setting.gradient_size * weights.trainable, setting.ranks if setting.stage >= 2 else 1)


def _bucket(weights: Weights, setting: Setting) -> int:
    """The buffer in which gradients are reduced."""
    W, b = weights.trainable, setting.size
    if setting.stage == 0:
        return b * min(W, ALL_REDUCE_AT_ONCE)
    if setting.fp32_reduction:
        return 4 * min(W, ALL_REDUCE_AT_ONCE)
    size = zero_elements(setting.zero, "reduce_bucket_size")
    if setting.touched:
        size = min(size, W)
    return b * size * (2 if setting.stage < 3 and setting.zero.get("overlap_comm") else 1)


def _gathered(weights: Weights, setting: Setting) -> int:
    """Weights that ZeRO-3 holds whole at the end of the forward pass.

    Those needed again within `stage3_max_reuse_distance` elements stay: half of it lies ahead, in the backward pass; then the
    module at work, and what is prefetched, which is there twice: the buffer in which it arrived stays until the last of
    its weights was used. A single rank gathers nothing.
    """
    if setting.stage < 3 or setting.ranks == 1:
        return 0
    each = weights.gathered_bytes / max(1, weights.gathered_elements)
    prefetched = round(zero_elements(setting.zero, "stage3_prefetch_bucket_size") * each)
    whole = round(_kept(setting) * each) + prefetched + weights.largest_module_bytes
    return min(weights.gathered_bytes, whole) + min(weights.gathered_bytes, prefetched)


def _kept(setting: Setting) -> int:
    """Elements that stay gathered from the forward pass to the backward pass."""
    return zero_elements(setting.zero, "stage3_max_reuse_distance") // 2


def _step(weights: Weights, setting: Setting) -> int:
    """What the optimizer's step holds beyond gradients: an fp32 copy of a group's gradients, Adam's temporaries on CPUs."""
    group = max(weights.groups, default=0)
    if setting.stage == 0:
        copies = 4 * weights.trainable if setting.half else 0
        return copies + (8 * weights.largest_trainable if setting.touched else 0)
    part = _up(group, setting.ranks)
    return 4 * part + (8 * part if setting.touched else 0)


def wire_bytes(weights: Weights, setting: Setting) -> dict[str, int]:
    """Bytes that one rank sends in an optimizer step, by what they are; rings, so (N-1)/N of a tensor per pass over it.

    Gradients travel in the dtype of training, also where they are accumulated in float32 (stage 1 in bf16).
    """
    W, b, N = weights.trainable, setting.size, setting.ranks
    if N == 1:
        return {}

    def ring(size: float) -> int:
        return round(size * (N - 1) / N)

    if setting.stage == 0:
        return {"gradients": ring(2 * b * W)}
    if setting.stage == 1:
        return {"gradients": ring(2 * b * W), "weights": ring(b * W)}
    if setting.stage == 2:
        return {"gradients": ring(2 * b * W * setting.micro_steps), "weights": ring(b * W)}
    whole = weights.gathered_bytes - weights.persistent_bytes
    again = 1 - min(
        1.0, _kept(setting) / max(1, weights.gathered_elements)
    )  # share gathered again in the backward pass
    return {
        "gradients": ring(b * W * setting.micro_steps),
        "gathered weights": ring((1 + again) * whole * setting.micro_steps),
        "small weights": ring(weights.persistent_bytes),
    }


def checkpoint_bytes(weights: Weights, setting: Setting) -> dict[str, int]:
    """A checkpoint on disk: trained weights alone, and DeepSpeed's own state of all ranks (at stage 3 without weights)."""
    W, b = weights.trainable, setting.size
    master = 4 * W if setting.stage or setting.half else 0
    return {
        "trained weights": b * W,
        "engine: weights": b * W if setting.stage < 3 else 0,
        "engine: optimizer": master + 8 * W,
    }


def _up(size: int, ranks: int) -> int:
    return -(-size // ranks)
