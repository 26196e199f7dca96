"""The cost of each attention backend on a packed row, from short rows to long ones.

A random backbone (hidden 256, 4 layers, 4 heads on 2, LoRA rank 8, float32), a prefix of 60 tokens, samples of 12 to 36
tokens. One thread and its processor time, best of several rounds in turn: other programs on the machine disturb that least.

    python -m benchmarks.attention --out benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from benchmarks.machine import describe, today
from trainer.batch import Packing
from trainer.config import AdapterConfig, BackboneConfig, TinyConfig
from trainer.models.backbone.causal_lm import Backbone, build_backbone, build_tiny

TOKENS = (256, 512, 1024, 2048)
BACKENDS = ("sdpa", "blocks", "varlen")
PREFIX = 60


def make_backbone(folder: Path) -> Backbone:
    shape = TinyConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=512, layers=4, heads=4, kv_heads=2, head_dim=64
    )
    build_tiny(shape, ["some words for a tokenizer"], folder)
    config, adapter = BackboneConfig(name=str(folder), attention="blocks"), AdapterConfig(rank=8, dropout=0.0)
    return build_backbone(config, adapter, torch.float32, "cpu").train()


def make_packing(tokens: int, random: torch.Generator) -> Packing:
    """Samples of 12 to 36 tokens, `tokens` in all; the last is what is left."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(12, 37, (1,), generator=random))))
    return Packing(PREFIX, torch.tensor(lengths), tokens, max(lengths))


def seconds(backbone: Backbone, embeds: Tensor, packing: Packing, train: bool) -> float:
    """Processor time of one pass; `train`: with the gradients of LoRA and of the row's embeddings."""
    begin = time.process_time()
    with torch.set_grad_enabled(train):
        hidden = backbone.packed(embeds.requires_grad_(), packing)
        if train:
            hidden.square().sum().backward()
    return time.process_time() - begin


class Row(TypedDict):
    """A backend on a row of so many tokens."""

    tokens: int
    samples: int
    attention: str
    train_ms: float
    forward_ms: float


def measure(rounds: int) -> list[Row]:
    random = torch.Generator().manual_seed(0)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        backbone = make_backbone(Path(folder) / "tiny")
        for tokens in TOKENS:
            packing = make_packing(tokens, random)
            embeds = torch.randn(PREFIX + tokens, 256, generator=random)
            best = {(backend, train): float("inf") for backend in BACKENDS for train in (True, False)}
            for _ in range(rounds):
                for backend, train in best:
                    backbone.attention = backend
                    best[backend, train] = min(best[backend, train], seconds(backbone, embeds, packing, train))
            for backend in BACKENDS:
                row: Row = {
                    "tokens": tokens,
                    "samples": len(packing.length_B),
                    "attention": backend,
                    "train_ms": round(1e3 * best[backend, True], 1),
                    "forward_ms": round(1e3 * best[backend, False], 1),
                }
                found.append(row)
                print(*row.values(), sep="\t", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "date": today(),
        "command": f"python -m benchmarks.attention --rounds {chosen.rounds}",
        "machine": describe("torch", "transformers", "peft"),
        "threads": 1,
        "time": "processor time of one thread, best of the rounds",
        "rows": measure(chosen.rounds),
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
