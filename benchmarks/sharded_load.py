"""How much memory does a rank need to load a 4-bit backbone of which it keeps a part?

    python -m benchmarks.sharded_load [--ranks 1,2,4] [--work DIR] [--out benchmarks/results/sharded-load.json]

A random Llama of 374M parameters is written to a temporary folder, in bf16 and several files, and loaded for training in
bf16 with NF4 and double quantisation by 1, 2 and 4 real ranks: in parts (`load_model` with ZeRO-3, read by every rank or by
rank 0 for all), whole by the same loader (ZeRO 0 to 2), and whole by transformers' own. Another process reads each rank's
anonymous resident memory (RssAnon) every 10 ms; what the rank had before loading is subtracted. Before that each rank loads
a tiny model, which brings in what the libraries load lazily.

The bound: finished model / ranks + the largest tensor in each of its forms at once (as stored, in the dtype of training,
in 4 bits where it is quantised) + the scales, which every rank keeps whole + 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe, today
from benchmarks.ranks import ROOT, run_ranks

RESULT = ROOT / "benchmarks" / "results" / "sharded-load.json"
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
DTYPE = torch.bfloat16
TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
LOADERS = {  # on how many ranks at most: what each rank loads whole does not depend on their number
    "parts": 1024,
    "parts, read by rank 0": 1024,
    "whole": 2,
    "transformers": 2,
}
MARGIN = 1.10
SAMPLER = """
import sys, time
pid, peak, count, due = sys.argv[1], 0, 0, time.monotonic()
import select
while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
    text = open(f"/proc/{pid}/status").read()
    peak = max(peak, int(text.partition("RssAnon:")[2].split()[0]))
    count, due = count + 1, max(due + 0.01, time.monotonic())
print(peak, count)
"""


def anonymous() -> int:
    """This process's anonymous resident memory, bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def sizes(folder: Path) -> dict[str, int]:
    """Bytes that the bound is made of."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    finished = scales = largest = parameters = 0
    for name, parameter in model.named_parameters():
        n, wide = parameter.numel(), parameter.numel() * DTYPE.itemsize
        parameters += n
        four_bit = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        finished += n // 2 if four_bit else wide
        if four_bit:  # a byte for 64 weights, a float for 256 of these, and two code books
            scales += n // 64 + 4 * (n // 64 // 256) + 4 * (16 + 256)
        largest = max(largest, 2 * wide + (n // 2 if four_bit else 0))
    return {"parameters": parameters, "finished": finished, "scales": scales, "largest": largest}


def rank(folder: Path, loader: str, out: Path) -> None:
    """One rank: load once, write what it took."""
    from trainer.config import BackboneConfig
    from trainer.distributed.process_group import start_world, stop_world
    from trainer.models.backbone.loading import load_model
    from trainer.models.backbone.quantization import nf4_config

    world = start_world()
    zero3 = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}

    def load(name: Path) -> Any:
        if loader == "transformers":
            return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE, quantization_config=nf4_config(DTYPE, True))
        config = BackboneConfig(name=str(name), quantization="nf4", read="rank0" if "rank 0" in loader else "each")
        parts = zero3 if "parts" in loader else None
        return load_model(config, DTYPE, world.device, None, zero3=parts, ranks=world).model

    load(folder.parent / "tiny")
    dist.barrier()
    gc.collect()
    before = anonymous()
    sampler = subprocess.Popen(
        [sys.executable, "-c", SAMPLER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.3)
    began = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - began
    peak, samples = map(int, sampler.communicate("\n")[0].split())
    gc.collect()
    measured = {"peak": peak * 1024 - before, "after": anonymous() - before, "seconds": seconds, "samples": samples}
    (out / f"{world.rank}.json").write_text(json.dumps(measured))
    del model
    stop_world()


class Measured(TypedDict):
    """The largest peak, remainder and time of all ranks, and the fewest samples of memory that a rank has."""

    peak_mib: float
    after_mib: float
    seconds: float
    samples: int


def measure(folder: Path, loader: str, ranks: int, work: Path) -> Measured:
    """Peak over ranks of one loader on `ranks` processes."""
    out = work / f"{loader.replace(' ', '-')}-{ranks}"
    out.mkdir()
    arguments = ["benchmarks.sharded_load", "--rank", loader, "--work", str(out), "--model", str(folder)]
    run_ranks(arguments, ranks, out, timeout=900)
    per_rank = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return {
        "peak_mib": max(t["peak"] for t in per_rank) / 2**20,
        "after_mib": max(t["after"] for t in per_rank) / 2**20,
        "seconds": max(t["seconds"] for t in per_rank),
        "samples": min(t["samples"] for t in per_rank),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rank", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.model, arguments.rank, arguments.work)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        folder = work / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**TINY)).to(DTYPE).save_pretrained(work / "tiny")
        LlamaForCausalLM(LlamaConfig(**SHAPE)).to(DTYPE).save_pretrained(folder, max_shard_size="200MB")
        size = sizes(folder)
        cases = []
        for ranks in map(int, arguments.ranks.split(",")):
            bound = MARGIN * (size["finished"] / ranks + size["largest"] + size["scales"]) / 2**20
            for loader, most in LOADERS.items():
                if ranks > most:
                    continue
                found = measure(folder, loader, ranks, work)
                parts = loader.startswith("parts")
                cases.append({"ranks": ranks, "loader": loader, **found, "bound_mib": bound if parts else None})
                print(json.dumps(cases[-1]), flush=True)
        files = len(list(folder.glob("*.safetensors")))
    within = all(case["peak_mib"] <= case["bound_mib"] for case in cases if case["bound_mib"] is not None)
    result = {
        "what": "peak anonymous memory of a rank while it loads a 4-bit backbone: benchmarks/sharded_load.py",
        "date": today(),
        "machine": describe("torch", "transformers", "bitsandbytes", "deepspeed"),
        "model": {**SHAPE, "files": files, "stored": "bf16", **size},
        "within_bound": within,
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"within the bound: {within}")


if __name__ == "__main__":
    main()
