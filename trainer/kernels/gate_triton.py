# mypy: disable-error-code="assignment, no-untyped-def, misc, type-arg"
"""The gate's mix in Triton: one kernel forward, one backward. Imported only where it is to run.

The maths is that of :func:`trainer.kernels.gate.gate_mix_reference`. A program works on a tile of R rows (a row is one slot of one
sample) times all D columns, padded to a power of two; nothing loops over rows. Weights and their gradients are columns [R, 1] in
tuples, one per expert and modality, so no value crosses threads but in the three sums over D. A value that is not valid is
masked in the load: its memory is not touched.

Shapes: B samples, K slots, N = B K rows, R rows of a tile, E experts, M modalities, D width, P programs. Suffix C: a tuple with one
column or tile per choice (modality or expert) or, of a kernel's arguments, one tensor per expert and modality, expert-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 4096
_ELEMENTS = 1024  # of a tile: 8 per thread of 4 warps, so that a backward tile of every value fits the registers
_PROGRAMS = 128  # about one per multiprocessor before a program takes a second row


@triton.jit
def _load_columns(start, row_R1, here_R1, total: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    """`count` columns, from `first` on, of a matrix with `total` columns; 0 where there is no row."""
    columns_C = ()
    for i in tl.static_range(count):
        columns_C = columns_C + (tl.load(start + row_R1 * total + (first + i), mask=here_R1, other=0),)
    return columns_C


@triton.jit
def _store_columns(start, columns_C, row_R1, here_R1, total: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    for i in tl.static_range(count):
        tl.store(start + row_R1 * total + (first + i), columns_C[i], mask=here_R1)


@triton.jit
def _softmax(
    logits_C, valid_C, count: tl.constexpr, temperature: tl.constexpr, mean: tl.constexpr, dtype: tl.constexpr
):
    """Weights over the valid, exactly 0 elsewhere; under `mean` they are equal."""
    top = tl.where(valid_C[0], logits_C[0].to(dtype), -float("inf"))
    for i in tl.static_range(1, count):
        top = tl.maximum(top, tl.where(valid_C[i], logits_C[i].to(dtype), -float("inf")))
    raised_C = ()
    total = tl.zeros_like(top)
    for i in tl.static_range(count):
        if mean:
            raised = tl.where(valid_C[i], tl.zeros_like(top) + 1.0, 0.0)
        else:
            # the largest is taken off first: the difference of two finite logits may be -inf, never nan
            raised = tl.where(valid_C[i], tl.exp((logits_C[i].to(dtype) - top) / temperature), 0.0)
        raised_C = raised_C + (raised,)
        total += raised
    weight_C = ()
    for i in tl.static_range(count):
        # the largest raises to 1, so the sum is below 1 only where nothing is valid: there it is 0, and so are the weights
        weight_C = weight_C + (raised_C[i] / tl.maximum(total, 1.0),)
    return weight_C


@triton.jit
def _softmax_gradient(weight_C, gradient_C, count: tl.constexpr, temperature: tl.constexpr, mean: tl.constexpr):
    """Gradients of the logits: w (dw - sum w dw) / temperature; 0 where the weights are a mean."""
    inner = weight_C[0] * gradient_C[0]
    for i in tl.static_range(1, count):
        inner += weight_C[i] * gradient_C[i]
    out_C = ()
    for i in tl.static_range(count):
        if mean:
            out_C = out_C + (tl.zeros_like(inner),)
        else:
            out_C = out_C + (weight_C[i] * (gradient_C[i] - inner) / temperature,)
    return out_C


@triton.jit
def forward_kernel(
    values_C,
    modality_logits,
    expert_logits,
    valid,
    residual,
    weight,
    mixed,
    expert_weights,
    modality_weights,
    rstd,
    rows,
    K: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    temperature: tl.constexpr,
    eps: tl.constexpr,
    mean_modality: tl.constexpr,
    mean_expert: tl.constexpr,
    dtype: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column_1D = tl.arange(0, BLOCK)[None, :]
    here_R1 = row_R1 < rows
    inside_RD = here_R1 & (column_1D < D)
    place_RD = row_R1 * D + column_1D

    some_C = ()
    modality_C = ()
    for e in tl.static_range(E):
        given_C = ()
        for m in tl.static_range(M):
            given_C = given_C + (tl.load(valid + row_R1 // K * (E * M) + (e * M + m), mask=here_R1, other=0) != 0,)
        some = given_C[0]
        for m in tl.static_range(1, M):
            some = some | given_C[m]
        some_C = some_C + (some,)
        logits_C = _load_columns(modality_logits, row_R1, here_R1, E * M, e * M, M)
        weights_C = _softmax(logits_C, given_C, M, temperature, mean_modality, dtype)
        _store_columns(modality_weights, weights_C, row_R1, here_R1, E * M, e * M, M)
        modality_C = modality_C + weights_C
    logits_C = _load_columns(expert_logits, row_R1, here_R1, E, 0, E)
    expert_C = _softmax(logits_C, some_C, E, temperature, mean_expert, dtype)
    _store_columns(expert_weights, expert_C, row_R1, here_R1, E, 0, E)

    sum_RD = tl.load(residual + place_RD, mask=inside_RD, other=0.0).to(dtype)
    for i in tl.static_range(E * M):
        given = tl.load(valid + row_R1 // K * (E * M) + i, mask=here_R1, other=0) != 0
        value_RD = tl.load(values_C[i] + place_RD, mask=inside_RD & given, other=0.0).to(dtype)
        sum_RD += value_RD * (modality_C[i] * expert_C[i // M])
    rstd_R1 = 1.0 / tl.sqrt(tl.sum(sum_RD * sum_RD, axis=1, keep_dims=True) / D + eps)
    weight_1D = tl.load(weight + column_1D, mask=column_1D < D, other=0.0).to(dtype)
    tl.store(rstd + row_R1, rstd_R1, mask=here_R1)
    tl.store(mixed + place_RD, sum_RD * rstd_R1 * weight_1D, mask=inside_RD)


@triton.jit
def backward_kernel(
    values_C,
    valid,
    residual,
    weight,
    expert_weights,
    modality_weights,
    rstd,
    d_mixed,
    d_expert_weights,
    d_modality_weights,
    d_values_C,
    d_modality_logits,
    d_expert_logits,
    d_residual,
    d_weight_parts,
    rows,
    K: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    temperature: tl.constexpr,
    mean_modality: tl.constexpr,
    mean_expert: tl.constexpr,
    dtype: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column_1D = tl.arange(0, BLOCK)[None, :]
    here_R1 = row_R1 < rows
    inside_RD = here_R1 & (column_1D < D)
    place_RD = row_R1 * D + column_1D

    expert_C = _load_columns(expert_weights, row_R1, here_R1, E, 0, E)
    modality_C = _load_columns(modality_weights, row_R1, here_R1, E * M, 0, E * M)
    sum_RD = tl.load(residual + place_RD, mask=inside_RD, other=0.0).to(dtype)
    tiles_C = ()
    for i in tl.static_range(E * M):
        given = tl.load(valid + row_R1 // K * (E * M) + i, mask=here_R1, other=0) != 0
        value_RD = tl.load(values_C[i] + place_RD, mask=inside_RD & given, other=0.0).to(dtype)
        sum_RD += value_RD * (modality_C[i] * expert_C[i // M])
        tiles_C = tiles_C + (value_RD,)

    # y = w n with n = s rstd:  dw = sum dy n,  ds = rstd (w dy - n mean(w dy n))
    rstd_R1 = tl.load(rstd + row_R1, mask=here_R1, other=0.0)
    d_mixed_RD = tl.load(d_mixed + place_RD, mask=inside_RD, other=0.0).to(dtype)
    norm_RD = sum_RD * rstd_R1
    part = d_weight_parts + tl.program_id(0).to(tl.int64) * D + column_1D
    tl.store(part, tl.sum(d_mixed_RD * norm_RD, axis=0, keep_dims=True), mask=column_1D < D)
    d_norm_RD = d_mixed_RD * tl.load(weight + column_1D, mask=column_1D < D, other=0.0).to(dtype)
    mean_R1 = tl.sum(d_norm_RD * norm_RD, axis=1, keep_dims=True) / D
    d_sum_RD = rstd_R1 * (d_norm_RD - norm_RD * mean_R1)
    tl.store(d_residual + place_RD, d_sum_RD, mask=inside_RD)

    d_expert_C = ()
    for e in tl.static_range(E):
        d_expert = tl.load(d_expert_weights + row_R1 * E + e, mask=here_R1, other=0.0)
        own_C = ()
        d_modality_C = ()
        for m in tl.static_range(M):
            given = tl.load(valid + row_R1 // K * (E * M) + (e * M + m), mask=here_R1, other=0) != 0
            d_value_RD = tl.where(given, d_sum_RD * (modality_C[e * M + m] * expert_C[e]), 0.0)
            tl.store(d_values_C[e * M + m] + place_RD, d_value_RD, mask=inside_RD)
            d_product = tl.sum(d_sum_RD * tiles_C[e * M + m], axis=1, keep_dims=True)
            d_expert += modality_C[e * M + m] * d_product
            d_modality = tl.load(d_modality_weights + row_R1 * (E * M) + (e * M + m), mask=here_R1, other=0.0)
            d_modality_C = d_modality_C + (d_modality + expert_C[e] * d_product,)
            own_C = own_C + (modality_C[e * M + m],)
        d_logits_C = _softmax_gradient(own_C, d_modality_C, M, temperature, mean_modality)
        _store_columns(d_modality_logits, d_logits_C, row_R1, here_R1, E * M, e * M, M)
        d_expert_C = d_expert_C + (d_expert,)
    d_logits_C = _softmax_gradient(expert_C, d_expert_C, E, temperature, mean_expert)
    _store_columns(d_expert_logits, d_logits_C, row_R1, here_R1, E, 0, E)


def tile(rows: int, width: int) -> dict[str, int]:
    """Rows and padded columns of a tile, and warps of its program.

    8 elements per thread whatever the width; fewer rows per program where there would be too few programs to keep a GPU busy.
    """
    block = triton.next_power_of_2(width)
    high = max(1, min(_ELEMENTS // block, triton.next_power_of_2(triton.cdiv(rows, _PROGRAMS))))
    return {"R": high, "BLOCK": block, "num_warps": max(1, min(16, high * block // 256))}


def _arguments(values: Sequence[Tensor], valid_BEM: Tensor, accumulate: torch.dtype) -> dict[str, Any]:
    """What both kernels take by name, but for the options."""
    B, K, D = values[0].shape
    _, E, M = valid_BEM.shape
    if D > MAX_WIDTH:
        raise ValueError(
            f"the Triton gate takes a width of at most {MAX_WIDTH}, not {D}: set model.fusion.gate.kernel=reference"
        )
    return {
        "rows": B * K,
        "K": K,
        "E": E,
        "M": M,
        "D": D,
        "dtype": tl.float64 if accumulate == torch.float64 else tl.float32,
    }


def forward(
    values: Sequence[Tensor],
    modality_logits_BKEM: Tensor,
    expert_logits_BKE: Tensor,
    valid_BEM: Tensor,
    residual_BKD: Tensor,
    weight_D: Tensor,
    *,
    accumulate: torch.dtype,
    tiling: dict[str, int] | None = None,
    **options: float | bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, g2 [B, K, E], g1 [B, K, E, M] and 1 / rms [B, K]. `options`: temperature, eps, mean_modality, mean_expert."""
    arguments = _arguments(values, valid_BEM, accumulate)
    chosen = tiling or tile(arguments["rows"], arguments["D"])
    mixed_BKD = torch.empty_like(values[0], memory_format=torch.contiguous_format)
    shape_BKE = expert_logits_BKE.shape
    expert_BKE = mixed_BKD.new_empty(shape_BKE, dtype=accumulate)
    modality_BKEM = mixed_BKD.new_empty(modality_logits_BKEM.shape, dtype=accumulate)
    rstd_BK = mixed_BKD.new_empty(shape_BKE[:2], dtype=accumulate)
    if arguments["rows"]:
        with torch.cuda.device_of(mixed_BKD):
            forward_kernel[triton.cdiv(arguments["rows"], chosen["R"]),](
                tuple(x.contiguous() for x in values),
                modality_logits_BKEM.contiguous(),
                expert_logits_BKE.contiguous(),
                valid_BEM.contiguous().view(torch.uint8),
                residual_BKD.contiguous(),
                weight_D.contiguous(),
                mixed_BKD,
                expert_BKE,
                modality_BKEM,
                rstd_BK,
                **arguments,
                **options,
                **chosen,
                enable_fp_fusion=True,  # multiply and add as one instruction: the default differs between versions
            )
    return mixed_BKD, expert_BKE, modality_BKEM, rstd_BK


def backward(
    values: Sequence[Tensor],
    logit_dtypes: tuple[torch.dtype, torch.dtype],
    valid_BEM: Tensor,
    residual_BKD: Tensor,
    weight_D: Tensor,
    expert_BKE: Tensor,
    modality_BKEM: Tensor,
    rstd_BK: Tensor,
    d_mixed_BKD: Tensor,
    d_expert_BKE: Tensor,
    d_modality_BKEM: Tensor,
    *,
    tiling: dict[str, int] | None = None,
    **options: float | bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Gradients of values, logits of modalities and of experts, residual and weight. `options`: temperature and the means.

    The gradient of the weight is summed inside each tile, then over tiles by torch: always in one order.
    """
    accumulate = rstd_BK.dtype
    arguments = _arguments(values, valid_BEM, accumulate)
    chosen = tiling or tile(arguments["rows"], arguments["D"])
    programs = triton.cdiv(arguments["rows"], chosen["R"])
    d_values = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in values]
    d_modality_logits_BKEM = torch.empty_like(modality_BKEM, dtype=logit_dtypes[0])
    d_expert_logits_BKE = torch.empty_like(expert_BKE, dtype=logit_dtypes[1])
    d_residual_BKD = torch.empty_like(residual_BKD, memory_format=torch.contiguous_format)
    parts_PD = rstd_BK.new_empty(programs, arguments["D"])
    if programs:
        with torch.cuda.device_of(rstd_BK):
            backward_kernel[programs,](
                tuple(x.contiguous() for x in values),
                valid_BEM.contiguous().view(torch.uint8),
                residual_BKD.contiguous(),
                weight_D.contiguous(),
                expert_BKE.contiguous(),
                modality_BKEM.contiguous(),
                rstd_BK.contiguous(),
                d_mixed_BKD.contiguous(),
                d_expert_BKE.contiguous(),
                d_modality_BKEM.contiguous(),
                tuple(d_values),
                d_modality_logits_BKEM,
                d_expert_logits_BKE,
                d_residual_BKD,
                parts_PD,
                **arguments,
                **options,
                **chosen,
                enable_fp_fusion=True,  # multiply and add as one instruction: the default differs between versions
            )
    return d_values, d_modality_logits_BKEM, d_expert_logits_BKE, d_residual_BKD, parts_PD.sum(0).to(weight_D.dtype)
