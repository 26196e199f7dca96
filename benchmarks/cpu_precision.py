"""What precision and 4-bit weights cost on a CPU: a packed row forward and backward, as ratios to fp32 without quantization.

A random backbone (hidden 512, 8 layers, LoRA rank 8, vocabulary 8,192), a prefix of 60 tokens, samples of 12 to 36 tokens, 512 in
all. One thread and its processor time, best of several rounds in turn. ``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`` in front
measures what a processor without AVX-512 and its bf16 instructions does.

    python -m benchmarks.cpu_precision --out benchmarks/results/cpu-precision.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Literal, TypedDict

import torch

from benchmarks.attention import PREFIX, make_packing, seconds
from benchmarks.machine import describe, today
from trainer.config import AdapterConfig, BackboneConfig, TinyConfig
from trainer.models.backbone.causal_lm import Backbone, build_backbone, build_tiny

HIDDEN, TOKENS = 512, 512
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZATIONS: tuple[Literal["none", "nf4"], ...] = ("none", "nf4")


class Row(TypedDict):
    """One combination; ratios are to fp32 without quantization."""

    precision: str
    quantization: str
    train_ms: float
    train_ratio: float
    forward_ms: float
    forward_ratio: float


def make_backbones(folder: Path) -> dict[tuple[str, str], Backbone]:
    shape = TinyConfig(
        vocab_size=8192, hidden_size=HIDDEN, intermediate_size=1536, layers=8, heads=8, kv_heads=4, head_dim=64
    )
    build_tiny(shape, ["some words for a tokenizer"], folder)
    adapter = AdapterConfig(rank=8, dropout=0.0)
    return {
        (precision, quantization): build_backbone(
            BackboneConfig(name=str(folder), quantization=quantization), adapter, dtype, "cpu"
        ).train()
        for precision, dtype in PRECISIONS.items()
        for quantization in QUANTIZATIONS
    }


def measure(rounds: int) -> list[Row]:
    random = torch.Generator().manual_seed(0)
    packing, embeds = make_packing(TOKENS, random), torch.randn(PREFIX + TOKENS, HIDDEN, generator=random)
    with tempfile.TemporaryDirectory() as folder:
        backbones = make_backbones(Path(folder) / "tiny")
        best = {(key, train): float("inf") for key in backbones for train in (True, False)}
        for _ in range(rounds):
            for key, train in best:
                row = embeds.detach().to(PRECISIONS[key[0]])
                best[key, train] = min(best[key, train], seconds(backbones[key], row, packing, train))
    base = ("fp32", "none")
    return [
        {
            "precision": key[0],
            "quantization": key[1],
            "train_ms": round(1e3 * best[key, True], 1),
            "train_ratio": round(best[key, True] / best[base, True], 2),
            "forward_ms": round(1e3 * best[key, False], 1),
            "forward_ratio": round(best[key, False] / best[base, False], 2),
        }
        for key in backbones
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if name in os.environ]
    limits = {name: os.environ[name] for name in names}
    result = {
        "date": today(),
        "command": " ".join(
            [*(f"{k}={v}" for k, v in limits.items()), f"python -m benchmarks.cpu_precision --rounds {chosen.rounds}"]
        ),
        "machine": describe("torch", "transformers", "peft", "bitsandbytes"),
        "threads": 1,
        "time": "processor time of one thread, best of the rounds",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "rows": measure(chosen.rounds),
    }
    print(json.dumps(result["rows"], indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
