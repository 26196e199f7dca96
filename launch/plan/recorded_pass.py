"""A forward and backward pass of one micro-batch, recorded operation by operation: peak of memory and FLOPs.

What a pass holds is not estimated from formulas but recorded from the run's own code. PyTorch's FlopCounterMode is not
used as it is, because it would keep activations alive; its formulas are.
"""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from launch.plan.rows import Rows, zero_batch
from launch.plan.weights import tensor_bytes
from trainer.models.egmf import EGMF, LossOutput

SAMPLE_LAYERS = (2, 4)  # passes are recorded with so many layers; what a layer adds is their difference


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro-batch.

    Bytes beyond weights and inputs: `peak` without gradients of weights, `peak_with_gradients` with all that are there at
    the time. `flops`: multiplications and additions of matrix products, recomputation included.
    """

    peak: int
    peak_with_gradients: int
    flops: int


def record_pass(model: EGMF, rows: Rows) -> Pass:
    """Pass a micro-batch through the model, forward and backward, inside :func:`~launch.plan.fake_model.fake_tensors`.

    No garbage is collected meanwhile: a search through the thousands of tensors of a pass took a third of its time.
    """
    batch = zero_batch(model, rows)
    recorder, gradient_bytes = _PassRecorder(), [0]

    def count_and_free(p: Tensor) -> None:
        assert p.grad is not None
        gradient_bytes[0] += tensor_bytes(p.grad)
        p.grad = None
        recorder.gradients = gradient_bytes[0]

    hooks = [p.register_post_accumulate_grad_hook(count_and_free) for p in model.parameters() if p.requires_grad]
    with recorder, _no_garbage_collection():
        output = model(batch)
        assert isinstance(output, LossOutput)
        (output.loss_B.sum() + output.auxiliary_B.sum() + output.unused_param_zero).backward()
    for hook in hooks:
        hook.remove()
    return Pass(recorder.peak, recorder.peak_with_gradients, recorder.flops)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def extrapolate_layers(small: Pass, large: Pass, layers: int) -> Pass:
    """The pass of a model of `layers` layers from those with the two of `SAMPLE_LAYERS`: linear in their number."""
    few, many = SAMPLE_LAYERS

    def extrapolate(a: int, b: int) -> int:
        return round(b + (b - a) / (many - few) * (layers - many))

    return Pass(
        extrapolate(small.peak, large.peak),
        extrapolate(small.peak_with_gradients, large.peak_with_gradients),
        extrapolate(small.flops, large.flops),
    )


class _PassRecorder(TorchDispatchMode):
    """Bytes of the storages that are allocated under it, their peak, and the floating-point operations.

    `gradients` is counted on top in the second peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_with_gradients = self.flops = 0
        self._seen: dict[int, Any] = {}
        self._formulas = {**flop_registry, **_formulas()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if func._overloadpacket in self._formulas:
            self.flops += self._formulas[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in self._seen and id(storage) not in given:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _attention_flops(query: Any, key: Any, _value: Any, _dropout: float = 0, causal: bool = False, **_: Any) -> int:
    """Scores and weighted sums; of a causal row half of the square."""
    B, h, L, d = query
    whole = 2 * 2 * B * h * L * key[2] * d
    return whole // 2 if causal else whole


def _attention_backward_flops(
    _grad: Any, query: Any, key: Any, value: Any, _out: Any, _norm: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return _attention_flops(query, key, value, dropout, causal) * 5 // 2


def _gemm_4bit_flops(rows: Any, _packed: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows) * weight[0]


def _formulas() -> dict[Any, Any]:
    import bitsandbytes  # noqa: F401  # registers its operations

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
        torch.ops.bitsandbytes.gemm_4bit: shape_wrapper(_gemm_4bit_flops),
    }
