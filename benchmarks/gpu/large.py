"""A backbone of 7 to 8 billion parameters on one GPU: samples/s, positions/s, model FLOPs utilisation, peak memory.

    python -m benchmarks.gpu.large --out large.json
    python -m benchmarks.gpu.large --device cpu --tiny        # that it runs
    python -m benchmarks.gpu.large --precision nf4 --column ours --attention blocks --cudnn --micro-batch 8     # one way of many

Qwen3-8B's shape with random weights, made on the device layer by layer, in bf16 and in NF4 (bitsandbytes, double
quantisation), LoRA of rank 16 on all linear layers, with and without gradient checkpointing. MELD's shapes, optimizer
steps of 64 samples; columns as in :mod:`benchmarks.throughput`. What does not fit into memory is reported and left out.

Model FLOPs: a position costs 2 N forward and 2 N backward, N the weights of the decoder's linear layers (frozen:
gradients of inputs alone; what gradient checkpointing computes again, attention's own products, LoRA, head and fusion
network are not counted). Utilisation is 4 N x positions/s over the device's peak in bf16. Positions are all that
pass, padding included: samples/s tells what that is worth.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.contenders import COLUMNS, Contender, EgmfContender, Padded
from benchmarks.machine import describe, today
from benchmarks.padded import PaddedData, PaddedModel
from benchmarks.shapes import SHAPES, make_backbone, make_samples
from trainer.config import RunConfig
from trainer.models.backbone.adapter import adapt
from trainer.models.backbone.attention import choose_attention
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.checkpointing import set_checkpointing
from trainer.models.backbone.fingerprint import BaseFingerprint
from trainer.models.backbone.linear4bit import FrozenLinear4bit
from trainer.models.backbone.loading import resolve_attention
from trainer.models.backbone.quantization import settle

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    **QWEN3_8B, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 8192,
}  # fmt: skip
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16, dense, by the makers' data sheets
PRECISIONS = ("bf16", "nf4")
GLOBAL_BATCH, SAMPLES, LORA_RANK, STD = 64, 128, 16, 0.02


def random_model(
    sizes: dict[str, int | float | bool], dtype: torch.dtype, device: torch.device, nf4: bool
) -> Qwen3ForCausalLM:
    """A frozen random Qwen3 on `device`; of a layer's weights in `dtype` at most one layer's exist beside it."""
    config = Qwen3Config(**sizes, dtype=dtype, attn_implementation="sdpa")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    _fill(model.model.embed_tokens, device)
    _fill(model.model.norm, device)
    _fill(model.lm_head, device)
    for layer in model.model.layers:
        _fill(layer, device)
        if nf4:
            for name, module in list(layer.named_modules()):
                if isinstance(module, nn.Linear):
                    layer.set_submodule(name, _quantised(module, dtype, device))
    if nf4:
        model.is_loaded_in_4bit = True
        settle(model, "the random model")
    return model.requires_grad_(False)


def _fill(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=STD)
        else:
            nn.init.ones_(parameter)


def _quantised(module: nn.Linear, dtype: torch.dtype, device: torch.device) -> FrozenLinear4bit:
    with torch.device("meta"):
        layer = FrozenLinear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
            quant_type="nf4", quant_storage=torch.uint8,
        )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    weight = Params4bit(
        module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    layer.weight = weight.to(device)
    return layer


def make_ready(
    model: Qwen3ForCausalLM, folder: Path, config: RunConfig, device: torch.device, attention: str
) -> Backbone:
    """The model with LoRA and the tokenizer of `folder`, its attention checked, or chosen, as for any backbone."""
    dtype = model.dtype
    embedding = model.get_input_embeddings().weight
    norm = float(embedding[:4096].float().norm(dim=1).mean())
    backbone = Backbone(adapt(model, config.model.adapter, dtype), AutoTokenizer.from_pretrained(folder), "sdpa")
    backbone.to(device)
    backbone.embedding_norm, backbone.fingerprints = norm, BaseFingerprint("", "", exact=True)
    choose_attention(backbone, attention, resolve_attention(attention, device, dtype), "the random model")
    return backbone


def configured(layout: str, micro_batch: int | None = None) -> RunConfig:
    config = RunConfig(task="meld")
    config.data.layout = layout  # type: ignore[assignment]
    config.model.adapter.rank, config.model.adapter.alpha, config.model.adapter.dropout = LORA_RANK, 2 * LORA_RANK, 0.0
    config.train.global_batch, config.train.micro_batch = GLOBAL_BATCH, micro_batch
    return config


def contender(
    column: str, backbone: Backbone, folder: Path, device: torch.device, micro_batch: int | None
) -> Contender:
    """A column on a backbone that the columns share, each with its own part before it."""
    shape = SHAPES["meld"]
    samples = make_samples(shape, SAMPLES)
    torch.manual_seed(0)
    if column != "padded":
        layout = "padded" if column == "ours padded" else "packed"
        return EgmfContender(shape, samples, backbone, configured(layout, micro_batch))
    data = PaddedData(shape, samples, folder)
    return Padded(shape, data, PaddedModel(backbone.model, data, shape).to(device), GLOBAL_BATCH)


class Row(TypedDict, total=False):
    """A case: its rates, or `failed` and why."""

    precision: str
    checkpointing: bool
    column: str
    samples_per_second: float
    positions_per_second: float
    positions_per_sample: float
    step_seconds: float
    steps: int
    peak_gib: float | None
    evaluate_samples_per_second: float
    evaluate_positions_per_sample: float
    attention: str
    utilisation: float | None
    failed: str


def measure(made: Contender, device: torch.device, seconds: float) -> Row:
    """Training epochs after one that warms up, for about `seconds`; then an evaluation, the second of two."""
    cuda = device.type == "cuda"

    def timed(call: Any) -> tuple[float, int, int]:
        before, began = made.positions, time.perf_counter()
        n = call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began, n, made.positions - before

    def epoch(first: int) -> list[tuple[float, int, int]]:
        return [timed(lambda index=index: made.step(first + index)) for index in range(SAMPLES // GLOBAL_BATCH)]

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = epoch(0)  # warms up
    steps = epoch(len(steps))
    while sum(s[0] for s in steps) < seconds:
        steps += epoch(len(steps))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    timed(made.evaluate)
    took, n, passed = timed(made.evaluate)
    return {
        "samples_per_second": sum(s[1] for s in steps) / sum(s[0] for s in steps),
        "positions_per_second": sum(s[2] for s in steps) / sum(s[0] for s in steps),
        "positions_per_sample": sum(s[2] for s in steps) / sum(s[1] for s in steps),
        "step_seconds": statistics.median(s[0] for s in steps),
        "steps": len(steps),
        "peak_gib": peak,
        "evaluate_samples_per_second": n / took,
        "evaluate_positions_per_sample": passed / n,
    }


def cases(
    device: torch.device,
    sizes: dict[str, int | float | bool],
    seconds: float,
    *,
    precisions: Sequence[str],
    columns: Sequence[str],
    attention: str,
    micro_batch: int | None,
) -> list[Row]:
    """Every precision, with and without checkpointing, every column; printed as they come."""
    dtype = torch.bfloat16
    rows = []
    per_layer = sizes["hidden_size"] * (
        sizes["head_dim"] * (2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"])
        + 3 * sizes["intermediate_size"]
    )
    flops = 4 * per_layer * sizes["num_hidden_layers"]
    peak = next(
        (p for name, p in PEAKS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None
    )
    with tempfile.TemporaryDirectory() as work:
        folder = make_backbone(Path(work) / "tokenizer", 8192)
        for precision in precisions:
            torch.manual_seed(0)
            model = random_model(sizes, dtype, device, precision == "nf4")
            backbone = make_ready(model, folder, configured("packed"), device, attention)
            for checkpointing in (False, True):
                set_checkpointing(backbone.base, on=checkpointing)
                for column in columns:
                    row: Row = {"precision": precision, "checkpointing": checkpointing, "column": column}
                    try:
                        row |= measure(contender(column, backbone, folder, device, micro_batch), device, seconds)
                        row["attention"] = backbone.attention
                        row["utilisation"] = row["positions_per_second"] * flops / peak if peak else None
                    except torch.OutOfMemoryError as error:
                        row["failed"] = f"out of memory: {str(error).partition('.')[0]}"
                    rows.append(row)
                    print(line(row), flush=True)
                    for parameter in backbone.parameters():
                        parameter.grad = None
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
            del model, backbone
            gc.collect()
    return rows


def line(row: Row) -> str:
    head = f"{row['precision']:5} {'checkpointing' if row['checkpointing'] else '':14} {row['column']:12}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    used = "     ?" if row["utilisation"] is None else f"{row['utilisation']:6.1%}"
    peak = "     ?" if row["peak_gib"] is None else f"{row['peak_gib']:6.1f}"
    return (
        f"{head} {row['samples_per_second']:10.1f} {row['positions_per_second']:12.0f} {row['positions_per_sample']:10.1f} "
        f"{used:>6} {peak:>7} {row['evaluate_samples_per_second']:12.1f}"
    )


HEAD = (
    f"{'':33} {'samples/s':>10} {'positions/s':>12} {'per sample':>10} {'MFU':>6} {'peak GiB':>8} {'evaluated/s':>11}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size: to see that it runs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed steps per case")
    parser.add_argument("--precision", choices=PRECISIONS, help="one of them; default: both")
    parser.add_argument("--column", choices=COLUMNS, help="one of them; default: all")
    parser.add_argument("--attention", default="auto", help="model.backbone.attention")
    parser.add_argument("--cudnn", action="store_true", help="let torch take cuDNN's attention, which runs leave out")
    parser.add_argument("--micro-batch", type=int, help="train.micro_batch; by default a step is one row")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.enable_cudnn_sdp(args.cudnn)
    print(HEAD)
    sizes = TINY if args.tiny else QWEN3_8B
    began = time.perf_counter()
    report = {
        "date": today(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu.large", *sys.argv[1:]]),
        "machine": {
            **describe("torch", "transformers", "peft", "bitsandbytes"),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "cuda": torch.version.cuda,
        },
        "model": sizes,
        "rows": cases(
            device,
            sizes,
            0.0 if args.tiny else args.seconds,
            precisions=[args.precision] if args.precision else PRECISIONS,
            columns=[args.column] if args.column else COLUMNS,
            attention=args.attention,
            micro_batch=args.micro_batch,
        ),
    }
    report["seconds"] = time.perf_counter() - began
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
