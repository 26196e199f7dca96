"""Does `egmf plan` predict the memory of a run? Real runs on CPU, measured, beside the plan's figures.

    python -m benchmarks.plan_memory --work DIR [--cases zero2-nf4,…] [--out benchmarks/results/plan-memory.json]

Every case trains two optimizer steps in fresh processes. Measured is the anonymous resident memory (RssAnon) of each rank,
sampled every 10 ms by another process, at its peak during the steps, over the same process before the model is loaded.
glibc's allocator gives freed memory back at once (MALLOC_MMAP_THRESHOLD_), so that its holes are not taken for the model's.
An interrupted benchmark goes on where it was, with the same --work.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from benchmarks.machine import describe, today
from benchmarks.ranks import ROOT, prepare_steps, run_ranks

if TYPE_CHECKING:
    import torch

    from trainer.distributed.world import World

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192}
STEPS = 2
SAMPLES = 16  # of a step, and in all: every step has the same, so the largest micro-batch is among its two
LIMIT = 0.15
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
WARM_UP = {  # what libraries allocate on first use belongs to no case
    "warm-up": ("model.backbone.name=tiny", "model.backbone.quantization=none"),
    "warm-up-3": (
        "model.backbone.name=tiny",
        "model.backbone.quantization=nf4",
        "model.adapter.kind=lora",
        "train.zero=3",
    ),
}
SAMPLER = """
import sys, time
pid, out = sys.argv[1:]
with open(out, "w") as stream:
    while True:
        try:
            text = open(f"/proc/{pid}/status").read()
        except OSError:
            break
        if "RssAnon:" not in text:
            break
        stream.write(f"{time.time():.4f} {text.split('RssAnon:')[1].split()[0]}\\n")
        stream.flush()
        time.sleep(0.01)
"""


@dataclass(frozen=True)
class Case:
    """A run: ZeRO stage, how the backbone is held and tuned, processes, layout of its micro-batches."""

    stage: int
    quantization: str
    kind: str
    checkpointing: bool
    precision: str
    procs: int
    layout: str = "packed"

    @property
    def name(self) -> str:
        parts = [f"zero{self.stage}", self.quantization, self.kind, self.precision]
        parts += ["checkpointing" if self.checkpointing else "plain", *(["padded"] if self.layout == "padded" else [])]
        return "-".join([*parts, str(self.procs)])

    def overrides(self, model: Path, data: Path) -> list[str]:
        return [
            "task=meld",
            f"data.path={data}/{{task}}",
            f"model.backbone.name={model}",
            f"model.backbone.quantization={self.quantization}",
            f"model.backbone.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"model.adapter.kind={self.kind}",
            "model.fusion.width=256",
            f"train.zero={self.stage}",
            f"train.precision={self.precision}",
            f"data.layout={self.layout}",
            f"train.global_batch={SAMPLES}",
            f"train.micro_batch={SAMPLES // 2}",
            f"train.steps={STEPS}",
            "track.mlflow=false",
        ]


def cases() -> list[Case]:
    """LoRA over a plain and a 4-bit backbone at every stage, on one and two ranks, with and without checkpointing; tuning
    the whole backbone, where gradients and Adam's states are the larger part; bf16; padded rows."""
    every = range(4)
    out = [Case(z, q, "lora", ck, "fp32", 2) for z in every for q in ("none", "nf4") for ck in (False, True)]
    out += [Case(z, "none", "full", True, precision, 2) for z in every for precision in ("fp32", "bf16")]
    out += [Case(z, "nf4", "lora", False, "bf16", 2) for z in (2, 3)]
    out += [Case(z, q, "lora", ck, "fp32", 1) for z in every for q, ck in (("none", False), ("nf4", True))]
    out += [Case(z, "none", "full", True, "fp32", 1) for z in (0, 2)]
    out += [Case(2, "nf4", "lora", ck, "fp32", 2, "padded") for ck in (False, True)]
    return out


def make_model(folder: Path) -> Path:
    """A random Qwen2 of `SIZES` with the tiny tokenizer, in Hugging Face form."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trainer.config import TinyConfig
    from trainer.models.backbone.tiny import build_tiny

    if (folder / "model.safetensors").is_file():
        return folder
    build_tiny(TinyConfig(vocab_size=400), ["Answer with one of: joy, anger.", "red green blue"], folder)
    shape = Qwen2Config(**SIZES, num_attention_heads=12, num_key_value_heads=4, tie_word_embeddings=False)
    shape.eos_token_id = shape.bos_token_id = shape.pad_token_id = 0
    torch.manual_seed(0)
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return folder


class RankMemory(TypedDict):
    """A rank's bytes: `base` at the start of the case; over it, `built` when the engine stands and the `peak` of the steps."""

    base: int
    built: int
    peak: int


class Planned(TypedDict):
    """The plan's bytes of a rank, and what they consist of."""

    bytes: int
    parts: dict[str, int]


class Result(TypedDict):
    """A case: the plan and the ranks, and by what share the plan is off on each."""

    case: str
    planned: int
    parts: dict[str, int]
    measured: list[RankMemory]
    off: list[float]


def measure(
    chosen: list[Case], model: Path, data: Path, work: Path, timeout: float = 3600
) -> dict[str, list[RankMemory]]:
    """Train the cases (all of one number of processes), one after the other; name -> per rank the bytes over the case's
    start: `built` when the engine stands, `peak` during the steps."""
    procs = chosen[0].procs
    place = work / f"procs{procs}"
    place.mkdir(parents=True, exist_ok=True)
    if {case.name for case in chosen} <= _measured(place, procs).keys():
        return {case.name: _measured(place, procs)[case.name] for case in chosen}
    (place / "cases.json").write_text(json.dumps({case.name: case.overrides(model, data) for case in chosen}))
    run_ranks(["benchmarks.plan_memory", "--rank", str(place)], procs, place, timeout, **ALLOCATOR)
    return {case.name: _measured(place, procs)[case.name] for case in chosen}


def _measured(place: Path, procs: int) -> dict[str, list[RankMemory]]:
    """What all ranks have written: name of a case -> the ranks' results, in order."""
    files = [place / f"rank{rank}.json" for rank in range(procs)]
    per_rank = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    return {name: [rank[name] for rank in per_rank] for name in per_rank[0] if all(name in rank for rank in per_rank)}


def work_of_rank(place: Path) -> None:
    """One rank of :func:`measure`."""
    import bitsandbytes  # noqa: F401  # before anything is measured
    import peft  # noqa: F401

    from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world
    from trainer.files import write_json

    quiet_deepspeed()
    world = start_world()
    trace = place / f"rank{world.rank}.trace"
    sampler = subprocess.Popen([sys.executable, "-S", "-c", SAMPLER, str(os.getpid()), str(trace)])
    written = place / f"rank{world.rank}.json"
    results = json.loads(written.read_text()) if written.is_file() else {}
    overrides_by_case = json.loads((place / "cases.json").read_text())
    try:
        for name, overrides in WARM_UP.items():
            _train([*next(iter(overrides_by_case.values())), *overrides], place / name, world, {})
        for name, overrides in overrides_by_case.items():
            if all(world.gather_all(name in results)):  # by an earlier start
                continue
            world.barrier()
            for _ in range(3):
                gc.collect()
                time.sleep(0.1)
            marks = {"start": time.time()}
            _train(overrides, place / name, world, marks)
            lines = [line.split() for line in trace.read_text().splitlines() if len(line.split()) == 2]
            samples = [(float(at), int(kib) * 1024) for at, kib in lines]
            base = [size for at, size in samples if at < marks["start"]][-1]
            built = [size for at, size in samples if at < marks["steps"]][-1]
            peak = max(size for at, size in samples if marks["steps"] <= at <= marks["end"])
            results[name] = {"base": base, "built": built - base, "peak": peak - base}
            write_json(written, results)
            print(name, results[name], flush=True)
    finally:
        sampler.kill()
        sampler.wait()
    stop_world()


def _train(overrides: list[str], out: Path, world: World, marks: dict[str, float]) -> None:
    steps = prepare_steps(overrides, out, world, STEPS, _copy_mapped)
    gc.collect()
    time.sleep(0.1)
    marks["steps"] = time.time()
    for index in range(STEPS):
        steps.step(index)
    marks["end"] = time.time()
    steps.engine.destroy()


def _copy_mapped(model: torch.nn.Module) -> None:
    """Copy the weights out of the memory-mapped file, as a GPU does."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.clone()


def predict(case: Case, model: Path, data: Path) -> Planned:
    """The plan's figure for the same run, in bytes; buffers as CPUs count them."""
    from launch.plan.lengths import run_lengths
    from launch.plan.memory import rank_memory
    from launch.plan.plan import backbone_shape, make_setting, profile_model
    from trainer.config import load_config

    config = load_config(ROOT / "configs/tiny.yaml", case.overrides(model, data))
    key = (case.quantization, case.kind, case.precision, case.layout)
    if key not in _LOOKED:
        lengths = run_lengths(config, case.procs)
        _LOOKED[key] = profile_model(config, backbone_shape(config), lengths)
    looked, micro_steps = _LOOKED[key], 2 // case.procs
    setting = make_setting(config, case.procs, micro_steps, stage=case.stage, touched=True)
    memory = rank_memory(looked.weights, looked.passes[case.checkpointing], setting)
    return {"bytes": memory.total, "parts": memory.device}


_LOOKED: dict[Any, Any] = {}


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        work_of_rank(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", help="only cases whose names contain one of these, separated by commas")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from tests.toy import prepare_toy

    work = args.work.resolve()
    model, data = make_model(work / "model"), work / "data"
    if not (data / "meld").is_dir():
        prepare_toy("meld", data, train=SAMPLES)
    results: list[Result] = []
    chosen = [c for c in cases() if not args.cases or any(part in c.name for part in args.cases.split(","))]
    predicted = {case.name: predict(case, model, data) for case in chosen}
    for case in chosen:  # in processes of its own: DeepSpeed's engines leave something behind
        for name, ranks in measure([case], model, data, work).items():
            plan = predicted[name]
            off = [plan["bytes"] / rank["peak"] - 1 for rank in ranks]
            results.append(
                {"case": name, "planned": plan["bytes"], "parts": plan["parts"], "measured": ranks, "off": off}
            )
            print(
                f"{name}: planned {plan['bytes'] / 2**20:.0f} MiB, measured",
                *(f"{r['peak'] / 2**20:.0f}" for r in ranks),
                flush=True,
            )
    worst = max(abs(off) for result in results for off in result["off"])
    print(f"{len(results)} cases, the worst off by {worst:.1%} (limit {LIMIT:.0%})")
    if args.out:
        report = {
            "date": today(),
            "command": "python -m benchmarks.plan_memory --work DIR --out benchmarks/results/plan-memory.json",
            "machine": describe("torch", "deepspeed", "transformers", "peft", "bitsandbytes"),
            "model": SIZES,
            "limit": LIMIT,
            "worst": worst,
            "cases": results,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if worst > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
