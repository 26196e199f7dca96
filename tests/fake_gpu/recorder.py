"""What an operator on the fake device means for a real one: kernels that are launched, and moments at which the host waits."""

from __future__ import annotations

import collections
import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# Nothing is launched for what only makes another view, or memory without contents.
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "expand",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "_reshape_alias",
        "lift_fresh",
        "lift_fresh_copy",
        "diagonal",
        "unfold",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "set_",
        "resize_",
        "is_same_size",
        "stride",
        "size",
        "numel",
        "sym_size",
        "_local_scalar_dense",
        "chunk",
        "narrow",
        "view_as",
        "is_pinned",
        "_has_compatible_shallow_copy_type",
    ]
)
# More than one kernel: read from torch's CUDA sources, at least.
SEVERAL = {
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_flash_attention_backward": 3,
    "convolution_backward": 2,
    "index_put": 3,
    "index_put_": 3,
    "sort": 4,
    "embedding_dense_backward": 4,
}
WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim", "masked_select", "bincount"}
)
_sdpa = torch.nn.functional.scaled_dot_product_attention
PER_LAUNCH = 32  # tensors that one kernel of the `_foreach` family takes, about


class Recorder(TorchDispatchMode):
    """Counts launches by operator, and host waits by the line of the project that causes them.

    `answer`: what a host gets that asks the device for a number; None: asking is an error, as it is for fake tensors.
    """

    def __init__(self, answer: float | None = None) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.sums_of_floats = 0  # running ones, which have no fixed order
        self.answer = answer

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.waits[f"{what} at {_place()}"] += 1

    def reset(self) -> None:
        self.sums_of_floats = 0
        self.launches.clear()
        self.waits.clear()

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "prim":  # asks for what a tensor is
            return func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.device.type == "cuda" for t in given)
        if on_device and self._waits(name, args, kwargs):
            self.wait(name)
            if self.answer is not None and name == "_local_scalar_dense":
                return type(self.answer)(self.answer) if args[0].is_floating_point() else int(self.answer)
        elif not on_device and self._copies(name, args, kwargs) and not kwargs.get("non_blocking"):
            self.wait("copy to the device")
        out = func(*args, **kwargs)
        made = any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in tree_leaves(out))
        if (on_device or made) and name not in VIEWS:
            self.launches[name] += _launches(name, args)
            self.sums_of_floats += name in ("cumsum", "logcumsumexp") and args[0].is_floating_point()
        return out

    @staticmethod
    def _copies(name: str, args: Any, kwargs: Any) -> bool:
        """Whether values of the host go to the device."""
        return name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == "cuda"

    @staticmethod
    def _waits(name: str, args: Any, kwargs: Any) -> bool:
        if name in WAITS:
            return True
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in (
            "index",
            "index_put",
            "index_put_",
        ):  # a mask is turned into numbers, numbers of the host are copied
            return any(
                i is not None and (i.dtype in (torch.bool, torch.uint8) or i.device.type == "cpu") for i in args[1]
            )
        if name == "_to_copy":  # from the device: a fresh copy in memory that is not pinned
            return args[0].device.type == "cuda" and torch.device(kwargs.get("device") or "cuda").type == "cpu"
        if name == "copy_":
            here, there = args[0].device.type, args[1].device.type
            return here != there and not (here == "cuda" and (args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        return False


def _launches(name: str, args: Any) -> int:
    if name.startswith(("_foreach", "_fused_adam")):
        return math.ceil(len(args[0]) / PER_LAUNCH)
    return SEVERAL.get(name, 1)


def _place() -> str:
    """The innermost line of the project, else of a library."""
    frames = [f for f in reversed(traceback.extract_stack()) if not f.filename.startswith(str(HERE))]
    for frame in frames:
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    for frame in frames:
        if "site-packages" in frame.filename and "/torch/" not in frame.filename:
            return f"{frame.filename.partition('site-packages/')[2]}:{frame.lineno} {frame.line}"
    return "?"


def attention_of_device(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """`scaled_dot_product_attention` as a GPU of compute capability 9.0 dispatches it (torch's own choice asks the CUDA build):
    flash attention in half precision without a mask, else the memory-efficient kernel."""
    if query.device.type != "cuda":
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    aten = torch.ops.aten
    half = query.dtype in (torch.float16, torch.bfloat16)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if attn_mask is None and half:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(times, 1, output_size=query.shape[1]) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        short = -attn_mask.shape[-1] % 8
        if short:
            attn_mask = torch.nn.functional.pad(attn_mask, (0, short))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def recorded(answer: float | None = None) -> Iterator[Recorder]:
    """Inside the block operators are recorded; inside :func:`launch.plan.fake_model.fake_tensors`."""
    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention_of_device),
        torch.autograd.set_multithreading_enabled(False),
        Recorder(answer) as recorder,
    ):
        yield recorder
