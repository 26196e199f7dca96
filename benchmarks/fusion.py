"""What the fusion network has to compute, and how long it takes: multiplications, bytes and processor time of a step of 32 samples.

    python -m benchmarks.fusion [--shape mosei] [--threads 1] [--rounds 15] --out benchmarks/results/fusion-mosei.json

Multiplications are those of matrix products, convolutions and attention, forward and backward, by torch's counter: of every sample alone,
without padding (the floor), and in the groups that a training on a CPU makes. Bytes are those that operators write, views left out. Each
group, and each expert of it, is timed by itself; the least of the rounds is taken, so that what else runs on the machine counts little, and
the groups are summed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import describe, today
from benchmarks.shapes import SHAPES, Shape, make_samples
from trainer.batch import Features, Sample, Standardisation
from trainer.config import FusionConfig
from trainer.data.sampling import group
from trainer.models.fusion.network import Fusion

HIDDEN, SAMPLES = 256, 32
Given = tuple[str, Tensor, Tensor, Features, Features]


class BytesWritten(TorchDispatchMode):
    """Counts the bytes of tensors that operators make or write, without views of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func.is_view or func.overloadpacket._qualified_op_name.endswith(
            ("::empty", "::_unsafe_view", "::detach")
        )
        if not views:
            tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return out


def network(shape: Shape) -> Fusion:
    """The default fusion network; its features are standardised, by statistics that change nothing."""
    torch.manual_seed(0)
    widths = {name: stream[0] for name, stream in shape.streams.items()}
    net = Fusion(FusionConfig(), {shape.name: widths}, HIDDEN, HIDDEN, 1.0)
    none = {m: Standardisation(np.zeros(n, np.float32), np.ones(n, np.float32), 10.0) for m, n in widths.items()}
    net.encoders.standardise({shape.name: none})
    return net


def words(sample: Sample, shape: Shape) -> int:
    """Tokens of the sample's text: a syllable pair with its space in English, a character in Chinese."""
    return max(1, len(sample.text) // (1 if shape.task.language == "zh" else 5))


def groups(shape: Shape, samples: Sequence[Sample], alone: bool) -> Iterator[Given]:
    """The network's inputs, of each sample alone or in groups of like length."""
    read_N3 = np.array([[words(s, shape), len(s.audio_TF), len(s.video_TF)] for s in samples])  # type: ignore[arg-type]
    chosen, sizes = group(range(len(samples)), read_N3)
    start = 0
    for size in [1] * len(samples) if alone else sizes:
        rows = list(chosen[start : start + size])
        start += size
        mask_BS = torch.arange(int(read_N3[rows, 0].max())) < torch.from_numpy(read_N3[rows, :1])
        yield (
            shape.name,
            torch.randn(*mask_BS.shape, HIDDEN),
            mask_BS,
            features([samples[i].audio_TF for i in rows], shape.rates[0]),  # type: ignore[misc]
            features([samples[i].video_TF for i in rows], shape.rates[1]),  # type: ignore[misc]
        )


def features(values: Sequence[np.ndarray], rate: float) -> Features:
    mask_BT = torch.arange(max(map(len, values))) < torch.tensor([[len(v)] for v in values])
    values_BTF = torch.zeros(*mask_BT.shape, values[0].shape[1])
    values_BTF[mask_BT] = torch.from_numpy(np.concatenate(values))
    return Features(values_BTF, mask_BT, ((torch.arange(mask_BT.shape[1]) + 0.5) / rate).expand(mask_BT.shape))


def train(net: Fusion, given: Given) -> None:
    out = net(*given)
    (out.pseudo_BKH.square().sum() + out.unused_param_zero).backward()


@torch.no_grad()
def evaluate(net: Fusion, given: Given) -> None:
    net(*given)


def _depthwise_backward(
    gradient: Sequence[int], values: Sequence[int], weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Operations of both gradients of a depthwise convolution, whose groups torch's counter does not know."""
    return 2 * 2 * int(np.prod(gradient)) * int(weight[-1])


def counted(net: Fusion, inputs: Sequence[Given]) -> dict[str, float]:
    """Millions of multiplications: forward by expert, forward of all, and of training."""
    with FlopCounterMode(display=False) as flops:
        for given in inputs:
            evaluate(net, given)
    of = {name: sum(ops.values()) / 2e6 for name, ops in flops.get_flop_counts().items()}
    found = {name: of[f"Fusion.experts.{name}"] for name in net.experts} | {"forward": of["Global"]}
    backward = {torch.ops.aten.convolution_backward: _depthwise_backward}
    with FlopCounterMode(display=False, custom_mapping=backward) as flops:
        for given in inputs:
            train(net, given)
    return {**found, "train": flops.get_total_flops() / 2e6}


def written(net: Fusion, inputs: Sequence[Given]) -> float:
    """Megabytes that the operators of a training step write."""
    net.zero_grad()
    with BytesWritten() as found:
        for given in inputs:
            train(net, given)
    return found.total / 1e6


def least_written(net: Fusion, inputs: Sequence[Given]) -> float:
    """Megabytes of what cannot be left out: the outputs of all linear layers and convolutions, their gradients, and those of the weights once."""
    outputs = [0]

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        outputs[0] += out.numel()

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    for given in inputs:
        evaluate(net, given)
    for hook in hooks:
        hook.remove()
    return 4 * (2 * outputs[0] + sum(p.numel() for p in net.parameters())) / 1e6


def least(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Milliseconds of processor time of all calls, each the least of its rounds."""
    total = 0.0
    for call in calls:
        call()
        times = []
        for _ in range(rounds):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        total += min(times)
    return 1e3 * total


def timed(net: Fusion, inputs: Sequence[Given], rounds: int) -> dict[str, float]:
    """Of training and evaluation, and of the experts in training."""
    net.eval()
    found = {"evaluate": least([lambda g=g: evaluate(net, g) for g in inputs], rounds)}  # type: ignore[misc]
    net.train()
    found["train"] = least([lambda g=g: train(net, g) for g in inputs], rounds)  # type: ignore[misc]
    for name, expert in net.experts.items():
        calls = []
        for task, text, mask, audio, video in inputs:
            with torch.no_grad():
                streams = net.encoders(task, text, mask, {"audio": audio, "video": video})[0]
            for stream in streams.values():
                stream.content_BTD.requires_grad_()
                stream.values_BTD.requires_grad_()

            def call(expert: Any = expert, streams: Any = streams) -> None:
                sum(value.square().sum() for value in expert(streams).values).backward()

            calls.append(call)
        found[name] = least(calls, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mosei")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    samples = make_samples(shape, SAMPLES)
    net, inputs = network(shape), list(groups(shape, samples, alone=False))
    result = {
        "date": today(),
        "command": "python -m benchmarks.fusion " + " ".join(a for a in sys.argv[1:]),
        "machine": describe("torch"),
        "threads": args.threads,
        "frames_per_sample": float(np.mean([words(s, shape) + len(s.audio_TF) + len(s.video_TF) for s in samples])),  # type: ignore[arg-type]
        "groups": [len(given[1]) for given in inputs],
        "floor_millions": counted(net, single := list(groups(shape, samples, alone=True))),
        "millions": counted(net, inputs),
        "floor_megabytes": least_written(net, single),
        "megabytes": written(net, inputs),
        "milliseconds": timed(net, inputs, args.rounds),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
