"""The hierarchical mix of the gate: two masked softmaxes, two weighted sums, a residual and an RMSNorm, in one operator.

`gate_mix` is what the model calls, `gate_mix_reference` the same maths in plain PyTorch, which it is compared with. The operator
`egmf::gate_mix` and its backward run hand-written PyTorch on any device, or Triton on CUDA (gate_triton.py); docs/kernels.md.

Shapes: B samples, K slots, E experts, M modalities, D width. `values` are E M tensors [B, K, D], expert-major: (expert 0, modality
0), (expert 0, modality 1), ...
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_TRITON = "trainer.kernels.gate_triton"
_CAPABILITY = (8, 0)  # of the oldest GPU that the kernels are compiled for in tests
_MAX_WIDTH = 4096
_MAX_VALUES = 9  # E M: a program holds a tile of each in registers, and more were never measured on a GPU


def gate_mix(
    values: Sequence[Tensor],
    modality_logits_BKEM: Tensor,
    expert_logits_BKE: Tensor,
    valid_BEM: Tensor,
    residual_BKD: Tensor,
    weight_D: Tensor,
    *,
    temperature: float = 1.0,
    eps: float = 1e-6,
    mean_modality: bool = False,
    mean_expert: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the experts' values into one vector per slot.

    With g1 = softmax over the valid modalities inside each expert, g2 = softmax over the experts that have one, both of
    logits / temperature:

        s_BKD = sum_e g2_BKe sum_m g1_BKem x_em_BKD + r_BKD
        y_BKD = s / sqrt(mean_D(s^2) + eps) * weight_D

    What is not valid has weight exactly 0, its values are not read (nan there changes nothing) and their gradient is exactly
    0. Where nothing is valid every weight is 0 and y = RMSNorm(r). A level under `mean_*` has equal weights over the valid
    instead of the softmax, and its logits are not read. Computed in float32, in float64 for float64 values.

    `kernel`: see :func:`resolve_kernel`. One operator for torch.compile and torch.export; first derivatives only.

    Returns:
        y in the dtype of the values, g2 [B, K, E] and g1 [B, K, E, M] in the dtype of the computation.

    Raises:
        ValueError: `kernel="triton"` cannot run here.
    """
    _, E, M = valid_BEM.shape
    B, K, D = values[0].shape
    assert len(values) == E * M, f"{len(values)} values for {E} experts of {M} modalities"
    assert modality_logits_BKEM.shape == (B, K, E, M), modality_logits_BKEM.shape
    assert expert_logits_BKE.shape == (B, K, E), expert_logits_BKE.shape
    assert residual_BKD.shape == (B, K, D), residual_BKD.shape
    mixed_BKD, expert_BKE, modality_BKEM, _ = _mix(
        list(values),
        modality_logits_BKEM,
        expert_logits_BKE,
        valid_BEM,
        residual_BKD,
        weight_D,
        temperature,
        eps,
        mean_modality,
        mean_expert,
        kernel,
    )
    return mixed_BKD, expert_BKE, modality_BKEM


def gate_mix_reference(
    values: Sequence[Tensor],
    modality_logits_BKEM: Tensor,
    expert_logits_BKE: Tensor,
    valid_BEM: Tensor,
    residual_BKD: Tensor,
    weight_D: Tensor,
    *,
    temperature: float = 1.0,
    eps: float = 1e-6,
    mean_modality: bool = False,
    mean_expert: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maths of :func:`gate_mix`, plainly; gradients come from autograd."""
    dtype = values[0].dtype
    accumulate = _accumulate(dtype)
    valid_B1EM = valid_BEM.unsqueeze(1)
    modality_BKEM = _weights(modality_logits_BKEM.to(accumulate), valid_B1EM, temperature, mean_modality)
    expert_BKE = _weights(expert_logits_BKE.to(accumulate), valid_B1EM.any(-1), temperature, mean_expert)
    values_BKEMD = torch.stack(list(values), 2).unflatten(2, valid_BEM.shape[1:]).to(accumulate)
    values_BKEMD = values_BKEMD.masked_fill(~valid_B1EM.unsqueeze(-1), 0.0)
    inner_BKED = (modality_BKEM.unsqueeze(-1) * values_BKEMD).sum(3)
    sum_BKD = (expert_BKE.unsqueeze(-1) * inner_BKED).sum(2) + residual_BKD.to(accumulate)
    rstd_BK1 = torch.rsqrt(sum_BKD.square().mean(-1, keepdim=True) + eps)
    return (sum_BKD * rstd_BK1 * weight_D.to(accumulate)).to(dtype), expert_BKE, modality_BKEM


def _weights(logits: Tensor, valid: Tensor, temperature: float, mean: bool) -> Tensor:
    """Weights over the last dimension: exactly 0 where not valid, all 0 where nothing is."""
    valid = valid.expand(logits.shape)
    if mean:
        chosen = valid.to(logits.dtype)
        return chosen / chosen.sum(-1, keepdim=True).clamp_min(1.0)
    # the lowest finite number instead of -inf: a row with nothing valid stays finite, and so do its gradients; the largest is
    # taken off before the division, which could otherwise overflow
    logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    top = logits.detach().amax(-1, keepdim=True)
    return ((logits - top) / temperature).softmax(-1) * valid


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- which kernel


@functools.cache
def resolve_kernel(asked: str, device: str, width: int, values: int = 9) -> str:
    """The kernel to run for `values` = E M tensors of a type of device: `triton` or `reference` (hand-written PyTorch).

    `auto` is Triton on CUDA where it can run, else the reference. The choice is logged once per process.

    Raises:
        ValueError: `triton` was asked for and cannot run here, with every reason.
    """
    reasons = [] if asked == "reference" else _triton_lacks(device, width, values)
    if asked == "triton" and reasons:
        raise ValueError(f"model.fusion.gate.kernel=triton cannot run: {'; '.join(reasons)}. Use auto, or reference")
    chosen = "reference" if asked == "reference" or reasons else "triton"
    # on a CPU the reference is what is expected
    why = f" ({'; '.join(reasons)})" if reasons and device == "cuda" else ""
    log.log(logging.WARNING if why else logging.INFO, "gate kernel on %s: %s%s", device, chosen, why)
    return chosen


def _triton_lacks(device: str, width: int, values: int) -> list[str]:
    if device != "cuda":
        return [f"it needs a CUDA device, and this run is on {device}"]
    reasons = []
    if torch.cuda.get_device_capability() < _CAPABILITY:
        reasons.append("it needs a GPU of compute capability {}.{} or later".format(*_CAPABILITY))
    if width > _MAX_WIDTH:
        reasons.append(f"it takes a width of at most {_MAX_WIDTH}, and model.fusion.width={width}")
    if values > _MAX_VALUES:
        reasons.append(f"it takes at most {_MAX_VALUES} values of experts times modalities, and there are {values}")
    # Triton builds a small launcher on first use
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        reasons.append("it needs a C compiler (apt-get install gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        reasons.append("it needs Python's headers (apt-get install python3-dev)")
    try:
        importlib.import_module(_TRITON)
    except ImportError as error:
        reasons.append(f"triton cannot be imported ({error}): pip install 'egmf-trainer[cuda]'")
    return reasons


def _triton() -> Any:
    return importlib.import_module(_TRITON)


# ---- the operator and its backward


@torch.library.custom_op("egmf::gate_mix", mutates_args=())
def _mix(
    values: list[Tensor],
    modality_logits: Tensor,
    expert_logits: Tensor,
    valid: Tensor,
    residual: Tensor,
    weight: Tensor,
    temperature: float,
    eps: float,
    mean_modality: bool,
    mean_expert: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, g2, g1 and 1 / rms [B, K], which the backward reads."""
    accumulate = _accumulate(values[0].dtype)
    if resolve_kernel(kernel, valid.device.type, values[0].shape[-1], len(values)) == "triton":
        return _triton().forward(
            values,
            modality_logits,
            expert_logits,
            valid,
            residual,
            weight,
            accumulate=accumulate,
            temperature=temperature,
            eps=eps,
            mean_modality=mean_modality,
            mean_expert=mean_expert,
        )
    valid_B1EM = valid.unsqueeze(1)
    modality_BKEM = _weights(modality_logits.to(accumulate), valid_B1EM, temperature, mean_modality)
    expert_BKE = _weights(expert_logits.to(accumulate), valid_B1EM.any(-1), temperature, mean_expert)
    weight_BKn = (expert_BKE.unsqueeze(-1) * modality_BKEM).flatten(2)
    sum_BKD = _weighted_sum((x.to(accumulate) for x in _masked(values, valid)), weight_BKn, residual)
    rstd_BK = torch.rsqrt(torch.linalg.vecdot(sum_BKD, sum_BKD) / sum_BKD.shape[-1] + eps)
    mixed_BKD = sum_BKD.mul_(rstd_BK.unsqueeze(-1)).mul_(weight.to(accumulate)).to(values[0].dtype)
    return mixed_BKD, expert_BKE, modality_BKEM, rstd_BK


@torch.library.custom_op("egmf::gate_mix_backward", mutates_args=())
def _mix_backward(
    values: list[Tensor],
    modality_logits: Tensor,
    expert_logits: Tensor,
    valid: Tensor,
    residual: Tensor,
    weight: Tensor,
    expert: Tensor,
    modality: Tensor,
    rstd: Tensor,
    d_mixed: Tensor,
    d_expert: Tensor,
    d_modality: Tensor,
    temperature: float,
    mean_modality: bool,
    mean_expert: bool,
    kernel: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Gradients of values, both logits (read for their dtypes only), residual and weight."""
    if resolve_kernel(kernel, valid.device.type, values[0].shape[-1], len(values)) == "triton":
        return _triton().backward(
            values,
            (modality_logits.dtype, expert_logits.dtype),
            valid,
            residual,
            weight,
            expert,
            modality,
            rstd,
            d_mixed,
            d_expert,
            d_modality,
            temperature=temperature,
            mean_modality=mean_modality,
            mean_expert=mean_expert,
        )
    accumulate = rstd.dtype
    read = [x.to(accumulate) for x in _masked(values, valid)]
    weight_BKn = (expert.unsqueeze(-1) * modality).flatten(2)

    # y = w n with n = s rstd:  dw = sum dy n,  ds = rstd (w dy - n mean(w dy n))
    rstd_BK1 = rstd.unsqueeze(-1)
    norm_BKD = _weighted_sum(read, weight_BKn, residual).mul_(rstd_BK1)
    d_mixed = d_mixed.to(accumulate)
    d_weight = torch.einsum("bkd,bkd->d", d_mixed, norm_BKD)
    d_norm_BKD = d_mixed * weight.to(accumulate)
    mean_BK1 = torch.linalg.vecdot(d_norm_BKD, norm_BKD).unsqueeze(-1) / norm_BKD.shape[-1]
    d_sum_BKD = d_norm_BKD.addcmul_(norm_BKD, mean_BK1, value=-1.0).mul_(rstd_BK1)

    spread = (
        (d_sum_BKD * weight_BK1).to(x.dtype) for x, weight_BK1 in zip(values, weight_BKn.split(1, -1), strict=True)
    )
    d_values = list(_masked(spread, valid))
    d_product_BKEM = torch.stack([torch.linalg.vecdot(d_sum_BKD, x) for x in read], -1).view(modality.shape)
    d_modality = d_modality + expert.unsqueeze(-1) * d_product_BKEM
    d_expert = d_expert + (modality * d_product_BKEM).sum(-1)
    return (
        d_values,
        _softmax_gradient(modality, d_modality, temperature, mean_modality).to(modality_logits.dtype),
        _softmax_gradient(expert, d_expert, temperature, mean_expert).to(expert_logits.dtype),
        d_sum_BKD.to(residual.dtype),
        d_weight.to(weight.dtype),
    )


def _masked(values: Iterable[Tensor], valid_BEM: Tensor) -> Iterator[Tensor]:
    """The values with 0 for what is not valid. On a CPU only the samples that lack one are written."""
    valid_Bn = valid_BEM.flatten(1)
    if valid_Bn.device.type != "cpu":  # elsewhere the host would have to wait for the answer
        for x, some_B in zip(values, valid_Bn.unbind(1), strict=True):
            yield torch.where(some_B.view(-1, 1, 1), x, 0.0)
    else:
        for i, (x, whole) in enumerate(zip(values, valid_Bn.all(0).tolist(), strict=True)):
            yield x if whole else x.index_fill(0, (~valid_Bn[:, i]).nonzero().squeeze(1), 0.0)


def _weighted_sum(read: Iterable[Tensor], weight_BKn: Tensor, residual_BKD: Tensor) -> Tensor:
    sum_BKD = residual_BKD.to(weight_BKn.dtype, copy=True, memory_format=torch.contiguous_format)
    for x, weight_BK1 in zip(read, weight_BKn.split(1, -1), strict=True):
        sum_BKD.addcmul_(x, weight_BK1)
    return sum_BKD


def _softmax_gradient(weights: Tensor, gradient: Tensor, temperature: float, mean: bool) -> Tensor:
    if mean:
        return torch.zeros_like(weights)
    return weights * (gradient - (weights * gradient).sum(-1, keepdim=True)) / temperature


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


@_mix.register_fake
def _(values, modality_logits, expert_logits, valid, residual, weight, *_):  # type: ignore[no-untyped-def]
    accumulate = _accumulate(values[0].dtype)
    return (
        _empty(values[0]),
        _empty(expert_logits, accumulate),
        _empty(modality_logits, accumulate),
        _empty(values[0][..., 0], accumulate),
    )


@_mix_backward.register_fake
def _(values, modality_logits, expert_logits, valid, residual, weight, *_):  # type: ignore[no-untyped-def]
    return [_empty(x) for x in values], *(_empty(x) for x in (modality_logits, expert_logits, residual, weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, *rest, temperature, _eps, mean_modality, mean_expert, kernel = inputs
    _, expert_BKE, modality_BKEM, rstd_BK = output
    ctx.mark_non_differentiable(rstd_BK)
    ctx.save_for_backward(*values, *rest, expert_BKE, modality_BKEM, rstd_BK)
    ctx.count = len(values)
    ctx.options = (temperature, mean_modality, mean_expert, kernel)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    d_values, d_modality, d_expert, d_residual, d_weight = _mix_backward(
        list(saved[: ctx.count]), *saved[ctx.count :], *gradients[:3], *ctx.options
    )
    return d_values, d_modality, d_expert, None, d_residual, d_weight, None, None, None, None, None


_mix.register_autograd(_backward, setup_context=_keep)
