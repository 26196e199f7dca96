"""Three questions for the first minute on a GPU, on which the speed and the promises of a training rest.

    python -m benchmarks.gpu.first_gpu --out first.json
    python -m benchmarks.gpu.first_gpu --device cpu            # that it runs

1. What does a shape cost that attention has not seen before? With packed rows nearly every step has one, and cuDNN builds a plan for
   each. With cuDNN's attention and without, forward and backward, the first time and afterwards.
2. Are the gradients of two equal steps equal bit by bit, with and without torch's deterministic algorithms?
3. Does AdamW(fused=True) take a step count that lies on the CPU, as a converted checkpoint may leave it?

Shapes: B groups of samples, h heads, g queries of a group to a head, L tokens, P tokens of a prefix, d width of a head.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, today

SHAPES = [(40 + i, 50 + 3 * i, 61) for i in range(8)]  # B, L, P
HEADS, QUERIES, WIDTH = 4, 7, 128  # of Qwen2.5-7B
REPEATS = 20


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """What `work` takes, the device's part included."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = clock()
    work()
    return clock() - began


def attention_pass(
    device: torch.device, B: int, L: int, P: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], list[Tensor]]:
    """A function that attends with a mask, as packed rows do in blocks, and returns the gradients of queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(B, HEADS, length, WIDTH, generator=draw).to(device, dtype).requires_grad_()
        for length in (QUERIES * L, P + L, P + L)
    ]
    mask = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P).repeat(QUERIES, 1).expand(B, 1, -1, -1)

    def run() -> list[Tensor]:
        loss = F.scaled_dot_product_attention(*tensors, attn_mask=mask).square().sum()
        return list(torch.autograd.grad(loss, tensors))

    return run


def convolution_pass(device: torch.device) -> Callable[[], list[Tensor]]:
    """A function that returns the gradients of a depthwise convolution over time, as the local expert's."""
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(256, 256, 5, padding=2, groups=256, bias=False).to(device, torch.bfloat16)
    x = torch.randn(16, 256, 120, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x).float().square().sum(), list(layer.parameters())))

    return run


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """cuDNN's attention allowed or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms, or not."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def cost_of_new_shapes(device: torch.device, shapes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Milliseconds of a pass over a shape that was not seen before, and of the same again: medians over the shapes."""
    rows = []
    for cudnn in (True, False):
        with cudnn_attention(cudnn):
            attention_pass(device, 8, 40, 60)()  # what any first call costs
            first, again = [], []
            for shape in shapes:
                run = attention_pass(device, *shape)
                first.append(seconds(device, run))
                again.append(min(seconds(device, run) for _ in range(2)))
        row = {"cudnn": cudnn, "new_ms": 1e3 * statistics.median(first), "again_ms": 1e3 * statistics.median(again)}
        rows.append(row)
        words = f"cuDNN's attention {'allowed' if cudnn else 'left out'}"
        print(
            f"{words}: a new shape {row['new_ms']:.2f} ms, again {row['again_ms']:.2f} ms (forward and backward)",
            flush=True,
        )
    return rows


def equal_bits(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Whether repeated passes over the same numbers give the same gradients, bit by bit."""
    rows = []
    for on in (False, True):
        for cudnn in (True, False):
            with deterministic(on), cudnn_attention(cudnn):
                rows.append(_repeated("attention", on, cudnn, lambda: attention_pass(device, *SHAPES[0]), repeats))
        with deterministic(on):
            rows.append(_repeated("depthwise convolution", on, None, lambda: convolution_pass(device), repeats))
    return rows


def _repeated(
    what: str, on: bool, cudnn: bool | None, make: Callable[[], Callable[[], list[Tensor]]], repeats: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "deterministic": on, "cudnn": cudnn, "same": None, "refused": None}
    try:
        run = make()
        reference = run()
        row["same"] = all(all(map(torch.equal, reference, run())) for _ in range(repeats))
    except RuntimeError as error:  # torch refuses what it cannot do in a deterministic way
        row["refused"] = str(error).splitlines()[0]
    found = f"refused ({row['refused']})" if row["refused"] else "same bits" if row["same"] else "OTHER BITS"
    ways = [f"deterministic {'on' if on else 'off'}", *([] if cudnn is None else [f"cuDNN {'on' if cudnn else 'off'}"])]
    print(f"{what}, {', '.join(ways)}: {found}", flush=True)
    return row


def step_on_the_cpu(device: torch.device) -> dict[str, Any]:
    """Whether a fused AdamW goes on with a step count on the CPU: its error, or the count and the values it comes to."""
    parameter = torch.nn.Parameter(torch.ones(1000, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    state = optimizer.state[parameter]
    state["step"] = state["step"].cpu()
    row: dict[str, Any] = {"error": None, "step": None, "right": None}
    try:
        optimizer.step()
        row["step"] = float(state["step"])
        twin = torch.nn.Parameter(torch.ones(1000, dtype=torch.float64))
        plain = torch.optim.AdamW([twin])
        for _ in range(2):
            twin.grad = torch.ones_like(twin)
            plain.step()
        row["right"] = bool(torch.allclose(parameter.detach().cpu().double(), twin.detach(), rtol=1e-6))
    except Exception as error:  # noqa: BLE001  the question is which
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(
        f"fused AdamW with its step count on the CPU: {row['error'] or ('right' if row['right'] else 'WRONG VALUES')}",
        flush=True,
    )
    return row


def main() -> int:
    """Ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one shape, two repeats: to see that it runs")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # what deterministic matrix products need, before the first
    device = torch.device(asked.device)
    result: dict[str, Any] = {
        "date": today(),
        "machine": describe("torch"),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "attention": cost_of_new_shapes(device, SHAPES[:1] if asked.tiny else SHAPES),
        "bits": equal_bits(device, 2 if asked.tiny else REPEATS),
        "adam": step_on_the_cpu(device),  # last: an illegal access would spoil what comes after it
    }
    if asked.out is not None:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
