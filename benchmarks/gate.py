"""What the gate's mix costs: the operator against eager and compiled PyTorch, forward and backward.

    python -m benchmarks.gate [--device cpu|cuda] [--rounds N] [--out benchmarks/results/gate-cpu.json]

First every contender's results and gradients are compared with the reference in float64; nothing is timed that is wrong. Then, for every
size, the contenders take turns, and medians are taken over the rounds, so that a busy moment of the machine meets all of them.

- stacked: the code before the operator. Values are stacked per expert, masked, stacked again, mixed; gradients by autograd.
- compiled: the same under torch.compile.
- kernel: `egmf::gate_mix`, hand-written PyTorch on a CPU, Triton on CUDA.
- graph kernel, graph compiled (CUDA): replays of a CUDA graph, without what launching costs: the time of the device alone.

`floor` is the time in which the device's memory can move the operator's bytes, where the device's bandwidth is known.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch._inductor import config, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import describe, today
from trainer.kernels.gate import gate_mix, gate_mix_reference, resolve_kernel

K, E, M = 4, 3, 3
SIZES = [(B, D) for D in (256, 512) for B in (8, 16, 32, 64)]
LARGE = [(4096, 512)]  # on CUDA also: enough to fill the device
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 5e-5, "bf16": 4e-2}
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}  # bytes per second, NVIDIA's datasheets (SXM)

Run = Callable[[], tuple[Tensor, ...]]


def stacked(
    values: list[Tensor],
    modality_logits: Tensor,
    expert_logits: Tensor,
    valid: Tensor,
    residual: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mix as it was before the operator, with the stacking that it needed."""
    experts = [torch.stack(values[e * M : e * M + M], 2) for e in range(E)]
    hidden = ~valid[:, None, :, :, None]
    values_BKEMD = torch.stack([x.masked_fill(hidden[:, :, e], 0.0) for e, x in enumerate(experts)], 2)
    accumulate = torch.promote_types(values_BKEMD.dtype, torch.float32)
    valid_B1EM = valid.unsqueeze(1)
    modality_BKEM = _weights(modality_logits.to(accumulate), valid_B1EM)
    expert_BKE = _weights(expert_logits.to(accumulate), valid_B1EM.any(-1))
    weight_BKEM = expert_BKE.unsqueeze(-1) * modality_BKEM
    wide_BKEMD = values_BKEMD.to(accumulate).masked_fill(~valid_B1EM.unsqueeze(-1), 0.0)
    mixed_BKD = (weight_BKEM.flatten(2).unsqueeze(-2) @ wide_BKEMD.flatten(2, 3)).squeeze(-2)
    mixed_BKD = mixed_BKD + residual.to(accumulate)
    scale_BK1 = torch.rsqrt(mixed_BKD.square().mean(-1, keepdim=True) + 1e-6)
    return (mixed_BKD * scale_BK1 * weight.to(accumulate)).to(values_BKEMD.dtype), expert_BKE, modality_BKEM


def _weights(logits: Tensor, valid: Tensor) -> Tensor:
    valid = valid.expand(logits.shape)
    return logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(-1) * valid


def make(B: int, D: int, dtype: torch.dtype, device: str) -> list[Any]:
    """Random inputs on a device; two samples of three have everything, the others a random part."""
    draw = torch.Generator().manual_seed(B + D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    valid = torch.rand(B, E, M, generator=draw) < 0.7
    valid[torch.arange(B) % 3 > 0] = True
    values = [normal(B, K, D) for _ in range(E * M)]
    return [values, normal(B, K, E, M), normal(B, K, E), valid.to(device), normal(B, K, D), normal(D)]


def step(mix: Callable[..., tuple[Tensor, ...]], inputs: list[Any]) -> Run:
    """One forward and backward pass; the balance loss reads the experts' weights, so they have a gradient too."""
    leaves = [*inputs[0], *inputs[1:3], *inputs[4:]]
    upstream = [torch.ones_like(inputs[4]) / 2, torch.ones_like(inputs[2], dtype=torch.float32) / 3]

    def run() -> tuple[Tensor, ...]:
        y, expert, modality = mix(*inputs)
        return (y, expert, modality, *torch.autograd.grad([y, expert], leaves, upstream))

    return run


def check(run: Run, inputs: list[Any], tolerance: float) -> float:
    """The largest error of a contender's results, over 1 + the largest entry of each.

    Raises:
        SystemExit: it is above `tolerance`.
    """
    exact = [[x.detach().double().requires_grad_() for x in inputs[0]]]
    exact += [t if t.dtype == torch.bool else t.detach().double().requires_grad_() for t in inputs[1:]]
    leaves = [*exact[0], *exact[1:3], *exact[4:]]
    y, expert, modality = gate_mix_reference(*exact)
    gradients = torch.autograd.grad([y, expert], leaves, [torch.ones_like(y) / 2, torch.ones_like(expert) / 3])
    worst = 0.0
    for result, reference in zip(run(), (y, expert, modality, *gradients), strict=True):
        error = (result.double() - reference).abs().max() / (1.0 + reference.abs().max())
        if not error <= tolerance:  # nan is wrong too
            sys.exit(f"wrong results: off by {error:.1e}, allowed {tolerance:.0e}")
        worst = max(worst, error.item())
    return worst


def graphed(run: Run) -> Run:
    """The pass as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def timed(contenders: dict[str, Run], rounds: int, device: str) -> dict[str, float]:
    """Median microseconds of each contender; they take turns. On a CPU processor time of one thread, on CUDA time on the clock."""
    inner = 10
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for lap in range(rounds + 3):  # three to warm up
        for name, run in contenders.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = clock()
            for _ in range(inner):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            if lap >= 3:
                seconds[name].append((clock() - begin) / inner)
    return {name: statistics.median(taken) * 1e6 for name, taken in seconds.items()}


def moved(B: int, D: int, size: int) -> int:
    """Bytes that the operator must move, forward and backward: 9 values, residual in, y out; then values, residual and dy
    in, their gradients out. What is small (logits, weights, masks) is left out."""
    return (3 * E * M + 5) * B * K * D * size


class Traffic(TorchDispatchMode):
    """Bytes of tensors that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        places = {t.untyped_storage().data_ptr() for t in read}
        if not any(t.untyped_storage().data_ptr() in places for t in written):
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return out


class TrafficRow(TypedDict, total=False):
    """Tensors [B, K, D] that each contender moves; `compiled` only where it was compiled."""

    dtype: str
    B: int
    D: int
    stacked: float
    kernel: float
    compiled: float


class TimeRow(TypedDict):
    """Times of the contenders at one size, their errors, the operator's bytes and the least time to move them."""

    dtype: str
    B: int
    D: int
    errors: dict[str, float]
    microseconds: dict[str, float]
    bytes: int
    floor_microseconds: float | None
    ratios: dict[str, float]


def bytes_moved(run: Run) -> int:
    """Bytes of all operators of a pass."""
    with Traffic() as counted:
        run()
    return counted.bytes


def traffic(device: str, compile_it: bool) -> list[TrafficRow]:
    """Bytes of one pass in tensors [B, K, D], counted from operators' and, compiled, from Inductor's kernels' arguments."""
    rows = []
    B, D = 64, 512
    for name, dtype in DTYPES.items():
        inputs = make(B, D, dtype, device)
        one = B * K * D * dtype.itemsize
        row: TrafficRow = {"dtype": name, "B": B, "D": D}
        row["stacked"], row["kernel"] = (bytes_moved(step(mix, inputs)) / one for mix in (stacked, gate_mix))
        if compile_it:
            torch._dynamo.reset()
            metrics.reset()
            counter = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
            counter.setLevel(logging.INFO)  # or Inductor does not count
            counter.propagate = False
            with config.patch(force_disable_caches=True):
                step(torch.compile(stacked, fullgraph=True, dynamic=False), inputs)()
            counter.setLevel(logging.WARNING)
            row["compiled"] = metrics.num_bytes_accessed / one
        print("tensors moved:", row, flush=True)
        rows.append(row)
    return rows


def measure(device: str, rounds: int, compile_it: bool) -> list[TimeRow]:
    rows = []
    speed = next((s for n, s in BANDWIDTH.items() if device == "cuda" and n in torch.cuda.get_device_name()), None)
    for name, dtype in DTYPES.items():
        for B, D in SIZES + (LARGE if device == "cuda" else []):
            inputs = make(B, D, dtype, device)
            mixes = {"stacked": stacked, "kernel": gate_mix}
            if compile_it:
                torch._dynamo.reset()  # every size is compiled for itself
                mixes["compiled"] = torch.compile(stacked, fullgraph=True, dynamic=False)
            contenders = {label: step(mix, inputs) for label, mix in mixes.items()}
            errors = {label: check(run, inputs, TOLERANCE[name]) for label, run in contenders.items()}
            if device == "cuda":
                contenders |= {
                    f"graph {label}": graphed(run) for label, run in contenders.items() if label != "stacked"
                }
            taken = timed(contenders, rounds, device)
            size = moved(B, D, dtype.itemsize)
            row: TimeRow = {
                "dtype": name, "B": B, "D": D, "errors": errors, "microseconds": taken, "bytes": size,
                "floor_microseconds": size / speed * 1e6 if speed else None,
                "ratios": {f"{other} / kernel": taken[other] / taken["kernel"] for other in mixes if other != "kernel"},
            }  # fmt: skip
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: TimeRow) -> str:
    taken = "  ".join(f"{name} {value:8.0f}" for name, value in row["microseconds"].items())
    ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items())
    floor = f"  floor {row['floor_microseconds']:.1f}" if row["floor_microseconds"] else ""
    return f"{row['dtype']}  B {row['B']:4d}  D {row['D']:3d}  us: {taken}{floor}  |  {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    kernel = resolve_kernel("auto", options.device, 512)
    moved_tensors = traffic(options.device, not options.no_compile)
    rows = measure(options.device, options.rounds, not options.no_compile)
    machine = describe("torch", *(["triton"] if kernel == "triton" else []))
    if options.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    result = {
        "what": "the gate's mix, forward and backward: median microseconds, and ratios to the operator",
        "date": today(),
        "command": f"python -m benchmarks.gate --device {options.device} --rounds {options.rounds} --out FILE",
        "machine": machine,
        "threads": torch.get_num_threads(),
        "kernel": kernel,
        "sizes": {"K": K, "E": E, "M": M},
        "tensors_moved": moved_tensors,
        "rows": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
