"""What `train.deterministic` costs, and whether it gives the same bits: steps of a model with and without it, each twice.

    python -m benchmarks.gpu.deterministic --out deterministic.json
    python -m benchmarks.gpu.deterministic --device cpu --tiny        # that it runs

A random model of :mod:`benchmarks.gpu.large` in NF4 with LoRA and checkpointing, MELD's shapes, optimizer steps of 64 samples. Each way
is run twice from the same weights; afterwards the trained weights of both are compared bit by bit. Times are medians of steps after the
first two, the two ways in turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.large import QWEN3_8B, TINY, configured, contender, make_ready, random_model
from benchmarks.machine import describe, today
from benchmarks.shapes import make_backbone
from trainer.models.backbone.checkpointing import set_checkpointing
from trainer.run.determinism import deterministic_algorithms

WARM = 2  # steps that are not timed


def run(
    sizes: dict[str, Any], device: torch.device, attention: str, steps: int, on: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Seconds of each step, and the trained weights after the last."""
    with deterministic_algorithms(on), tempfile.TemporaryDirectory() as work:
        torch.manual_seed(0)
        folder = make_backbone(Path(work) / "tokenizer", 8192)
        model = random_model(sizes, torch.bfloat16, device, nf4=True)
        backbone = make_ready(model, folder, configured("packed"), device, attention)
        set_checkpointing(backbone.base, on=True)
        made: Any = contender("ours", backbone, folder, device, None)
        taken = []
        for index in range(WARM + steps):
            began = time.perf_counter()
            made.step(index)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        trained = {n: p.detach().cpu().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    del model, backbone, made
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return taken[WARM:], trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size: to see that it runs")
    parser.add_argument("--attention", default="auto", help="model.backbone.attention")
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.enable_cudnn_sdp(False)
    sizes: dict[str, Any] = TINY if args.tiny else QWEN3_8B
    seconds: dict[bool, list[float]] = {False: [], True: []}
    weights: dict[bool, list[dict[str, torch.Tensor]]] = {False: [], True: []}
    for on in (False, True, False, True):
        taken, trained = run(sizes, device, args.attention, args.steps, on)
        seconds[on] += taken
        weights[on].append(trained)
    differing = {
        on: sum(not torch.equal(first[name], second[name]) for name in first) for on, (first, second) in weights.items()
    }
    medians = {on: statistics.median(taken) for on, taken in seconds.items()}
    report = {
        "date": today(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu.deterministic", *sys.argv[1:]]),
        "machine": {
            **describe("torch", "transformers", "peft", "bitsandbytes"),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        },
        "model": sizes,
        "step_seconds": {"without": medians[False], "with": medians[True]},
        "ratio": medians[True] / medians[False],
        "weights": len(weights[True][0]),
        "differing_weights": {"without": differing[False], "with": differing[True]},
    }
    print(
        f"a step: {medians[False]:.4f} s without, {medians[True]:.4f} s with train.deterministic ({report['ratio']:.2f} times); "
        f"of {report['weights']} trained weights {differing[False]} and {differing[True]} differ between two runs"
    )
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if differing[True]:
        sys.exit("train.deterministic does not repeat")


if __name__ == "__main__":
    main()
