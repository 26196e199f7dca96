"""What is measured of a frozen weight while it is whole: hashes of what was read and of what is stored, whether it is finite, and the
length of embeddings.

Under ZeRO-3 no rank holds whole weights after loading, so the loader measures each one as it passes.

A run's frozen base is known by what was *read*. What is *stored* of a doubly quantised weight is no such thing: bitsandbytes subtracts from the
scales of its blocks their mean, and the last bit of a mean hangs on the number of threads, on a GPU on the number of its multiprocessors. Of
weights that are not quantised both are the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 1 << 19  # elements that are hashed and checked together, while a core's cache has them
READ_BLOCK = 1 << 22  # elements of a read weight that one thread hashes
SOURCE = "read:"  # before the hex digits of a fingerprint of what was read, where that differs from what is stored
INFINITY = {torch.float64: 0x7FF << 52, torch.float32: 0xFF << 23, torch.bfloat16: 0xFF << 7, torch.float16: 0x1F << 10}


@dataclass(frozen=True)
class Measured:
    """`parts`: (name below the weight's, dtype, shape, sha256) of each stored tensor; of 4-bit weights the scales too. `read`: of a
    quantised weight dtype, shape and hash before it was, and how it was quantised (:func:`measure_read`)."""

    parts: tuple[tuple[str, str, tuple[int, ...], str], ...]
    row_norm_V: Tensor | None = None  # L2 norms of an embedding's rows, float32
    finite: bool = True  # no nan and no infinity in what is stored
    read: str | None = None


@dataclass(frozen=True)
class BaseFingerprint:
    """The fingerprints of a model's frozen weights.

    Attributes: `source`, of what was read, which runs record; `stored`, of what is stored, which earlier versions recorded; `exact`, whether
    the latter is the same at every number of threads and on every device.
    """

    source: str
    stored: str
    exact: bool


def measure(parameter: nn.Parameter, *, rows: bool = False, read: str | None = None) -> Measured:
    """Measure a whole weight; `rows` asks for the norms of its rows, `read` is what :func:`measure_read` said of a quantised one."""
    stored = [("", parameter.data)]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        stored += [(f".{key}", value) for key, value in sorted(state.as_dict(packed=True).items())]
    digests = [_digest(tensor) for _, tensor in stored]
    parts = tuple((name, str(t.dtype), tuple(t.shape), d) for (name, t), (d, _) in zip(stored, digests, strict=True))
    return Measured(parts, row_norms(parameter.data) if rows else None, all(finite for _, finite in digests), read)


def measure_read(values: Tensor, quantised: str) -> tuple[str, bool]:
    """What a weight is before it is quantised, dtype, shape and hash, followed by `quantised`, the words of how that is done; and
    whether it is finite.

    The hash is sha256 over the sha256 of blocks of `READ_BLOCK` elements, which threads make; their number changes nothing.
    """
    blocks = values.detach().contiguous().cpu().reshape(-1).split(READ_BLOCK)
    if len(blocks) > 1:
        with ThreadPoolExecutor(max_workers=min(8, len(blocks), os.cpu_count() or 1)) as pool:
            found = list(pool.map(_digest, blocks))
    else:
        found = [_digest(block) for block in blocks]
    total = hashlib.sha256("".join(digest for digest, _ in found).encode()).hexdigest()
    finite = all(finite for _, finite in found)
    return f"{values.dtype} {tuple(values.shape)} {total} {quantised}", finite


def source_fingerprint(weights: Iterable[tuple[str, Measured]]) -> str:
    """:func:`fingerprint` with `SOURCE` before it, over what quantised weights were before and how they were quantised; of weights of
    which none is quantised :func:`fingerprint` itself."""
    total, weights = hashlib.sha256(), list(weights)
    if all(measured.read is None for _, measured in weights):
        return fingerprint(weights)
    for name, measured in weights:
        if measured.read is not None:
            total.update(f"{name} {measured.read}\n".encode())
            continue
        for below, dtype, shape, digest in measured.parts:
            total.update(f"{name}{below} {dtype} {shape} {digest}\n".encode())
    return SOURCE + total.hexdigest()


def fingerprint(weights: Iterable[tuple[str, Measured]]) -> str:
    """sha256 over names, dtypes, shapes and bytes of weights as they are stored, in their order."""
    total = hashlib.sha256()
    for name, measured in weights:
        for below, dtype, shape, digest in measured.parts:
            total.update(f"{name}{below} {dtype} {shape} {digest}\n".encode())
    return total.hexdigest()


def row_norms(weight_VH: Tensor) -> Tensor:
    """L2 norm of every row, float32, in blocks: no second copy of the table."""
    return torch.cat([block.float().norm(dim=1) for block in weight_VH.detach().split(8192)])


def is_finite(values: Tensor) -> bool:
    """Whether floating values have neither nan nor infinity; of 8 bits and less, and of integers, always true."""
    if values.dtype not in INFINITY:
        return True
    if values.device.type != "cpu":
        return bool(values.isfinite().all())
    return all(map(_finite_bits, values.detach().contiguous().reshape(-1).split(BLOCK)))


def _finite_bits(block: Tensor) -> bool:
    """:func:`is_finite` of a flat block on the CPU, from its bits (IEEE 754), several times as fast as by `isfinite`.

    All exponent bits are set in nan and infinity alone. As integers with a sign, positive ones are therefore at least infinity's
    bits, and everything else is below; as integers without, the same is true of negative ones and the bits of -infinity.
    """
    infinity, size = INFINITY.get(block.dtype), block.dtype.itemsize
    if infinity is None or not block.numel():
        return True
    bits = block.view(torch.uint8).numpy()
    below = bits.view(f"i{size}").max() < infinity
    return bool(below and bits.view(f"u{size}").max() < infinity + (1 << 8 * size - 1))


def count_non_finite(values: Tensor) -> str:
    """`2 nan and 1 infinite among 4,096 values`."""
    counts = {"nan": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
    return f"{' and '.join(f'{n:,} {kind}' for kind, n in counts.items() if n)} among {values.numel():,} values"


def _digest(tensor: Tensor) -> tuple[str, bool]:
    """sha256 of a tensor's bytes, and whether it is finite, in one pass."""
    total, finite = hashlib.sha256(), True
    for block in tensor.detach().contiguous().cpu().reshape(-1).split(BLOCK):
        total.update(block.view(torch.uint8).numpy().data)
        finite = finite and _finite_bits(block)
    return total.hexdigest(), finite
