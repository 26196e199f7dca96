"""What a position of the language model costs in a packed row, against plain transformers with peft: CPU milliseconds.

A Llama of SmolLM2-135M's shape (random weights; `--model FOLDER` takes another) with LoRA of rank 16 on all linear layers, no fusion
network, texts of MELD's lengths. Each is one forward and backward pass over about 1,024 positions:

- *plain*: transformers' model in peft's wrapper on one row of 1,024 tokens, logits at every position, as scripts train;
- *plain, logits at answers*: the same, the head at one position in twelve;
- *packed*: this project's row, one instruction and samples behind it, for each attention and quantisation; with gradient checkpointing
  (`configs/base.yaml` has it on, for memory) and with LoRA dropout, to see what these cost.

Contenders take turns, `--rounds` times, in one process each round, and CPU seconds (user and system) are counted, so that a busy
machine says little less than an idle one. bfloat16 is measured where the processor has instructions for it: without, every way is slow.

    python -m benchmarks.backbone --out benchmarks/results/backbone.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe, today
from benchmarks.shapes import SHAPES, make_backbone, make_samples
from trainer.config import AdapterConfig, BackboneConfig, DataConfig
from trainer.data.collate import Collator
from trainer.models.backbone.causal_lm import build_backbone
from trainer.models.egmf import EGMF

POSITIONS, EVERY = 1024, 12
RANK, ALPHA = 16, 32
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of /proc/cpuinfo
Pass = Callable[[], torch.Tensor]


def make_model(folder: Path, small: bool) -> Path:
    """A random model of SmolLM2-135M's shape with the tokenizer of the other benchmarks; `small`: of two layers."""
    vocabulary = 49152
    make_backbone(folder, vocabulary)
    tokens = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2 if small else 30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=vocabulary, tie_word_embeddings=True,
        pad_token_id=tokens.get("pad_token_id"), eos_token_id=tokens.get("eos_token_id"), bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plain(folder: Path, dtype: torch.dtype, head_everywhere: bool) -> tuple[Pass, int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    ids = torch.randint(0, 1000, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    at = torch.arange(EVERY, POSITIONS, EVERY)

    def run() -> torch.Tensor:
        if head_everywhere:
            labels = torch.full_like(ids, -100)
            labels[0, at] = ids[0, at]
            loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
            return loss
        base = model.get_base_model()
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[0, at - 1]
        return torch.nn.functional.cross_entropy(base.lm_head(hidden).float(), ids[0, at])

    return run, POSITIONS


def packed(
    folder: Path,
    dtype: torch.dtype,
    attention: str = "blocks",
    quantization: str = "none",
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> tuple[Pass, int]:
    backbone = build_backbone(
        BackboneConfig(
            name=str(folder), attention=attention, quantization=quantization, gradient_checkpointing=checkpointing  # type: ignore[arg-type]
        ),
        AdapterConfig(rank=RANK, alpha=ALPHA, dropout=dropout), dtype, "cpu",
    )  # fmt: skip
    model, shape = EGMF(backbone, None).train(), SHAPES["meld"]
    collate = Collator(
        shape.task, backbone.tokenizer, DataConfig(), widths={}, rates={}, pseudo_tokens=0, modalities=("text",)
    )
    samples = make_samples(shape, 256)
    count = 1
    while count < len(samples) and collate.pack(samples[: count + 1]).positions <= POSITIONS:
        count += 1
    row = collate.pack(samples[:count])
    return lambda: model(row).loss_B.mean(), row.positions


def contenders(folder: Path, dtype: torch.dtype) -> dict[str, tuple[Pass, int]]:
    return {
        "plain": plain(folder, dtype, True),
        "plain, logits at answers": plain(folder, dtype, False),
        "packed, blocks": packed(folder, dtype),
        "packed, mask of the row": packed(folder, dtype, attention="sdpa"),
        "packed, NF4": packed(folder, dtype, quantization="nf4"),
        "packed, checkpointed": packed(folder, dtype, checkpointing=True),
        "packed, LoRA dropout 0.05": packed(folder, dtype, dropout=0.05),
    }


def measure(folder: Path, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float | list[float]]]:
    """CPU milliseconds a position of every contender, and how many times the plain pass's with logits at answers."""
    ways = contenders(folder, dtype)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (run, positions) in ways.items():
            before = time.process_time()
            run().backward()
            if turn:  # the first warms up
                found[name].append(1e3 * (time.process_time() - before) / positions)
    fair = found["plain, logits at answers"]
    return {
        name: {
            "positions": ways[name][1],
            "cpu_ms": statistics.median(values),
            "rounds": values,
            "times_plain": statistics.median(a / b for a, b in zip(values, fair, strict=True)),
        }
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; default: random, of SmolLM2-135M's shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two layers, one round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    dtypes = [torch.float32, *([torch.bfloat16] if flags & BFLOAT16 else [])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or make_model(Path(temporary) / "model", args.quick)
        results = {str(d).removeprefix("torch."): measure(folder, d, 1 if args.quick else args.rounds) for d in dtypes}
    whole = {
        "date": today(),
        "machine": describe("torch", "transformers", "peft", "bitsandbytes"),
        "bfloat16_instructions": bool(flags & BFLOAT16),
        "threads": args.threads,
        "results": results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for dtype, ways in results.items():
        for name, way in ways.items():
            print(f"{dtype:10} {name:26} {way['cpu_ms']:.2f} ms a position, {way['times_plain']:.2f} times")


if __name__ == "__main__":
    main()
