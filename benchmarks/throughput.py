"""How fast does it train and answer, against padded training as published scripts do it? Samples/s, positions, memory.

    python -m benchmarks.throughput --out benchmarks/results/throughput.json
    python -m benchmarks.throughput --shapes meld --vocab 32768 --quick

Three columns on the same random, frozen Qwen3 in float32 (width 256, 4 layers, intermediate 768, untied head), all
with LoRA of rank 8 on every linear layer (dropout 0), 32 samples to an optimizer step, torch's AdamW, the same
samples and instruction:

- *ours*: EGMF with its whole fusion network (three experts, gate, width 256, K = 4), packed rows;
- *ours padded*: the same model and order with `data.layout=padded`;
- *padded*: the baseline, see :mod:`benchmarks.padded`. Its micro-batch is the published one, 8.

A step is collation, forward, backward and optimizer; what is timed is an epoch of 256 samples (8 steps). Evaluation
answers 256 samples: by scoring every answer (ours), by `generate` until the longest answer (padded). Every column
runs in a fresh process, columns in turn, `--rounds` times; ratios are taken within a round, and their median is reported
with the smallest and largest. Memory is anonymous resident memory (RssAnon) above what the process has with its data
loaded and no model: its peak in a step, and in an evaluation, sampled every 5 ms outside the timed steps. Positions
are counted at the decoder's input. CPU seconds are reported too: less than wall seconds times threads, they show that the
machine was busy elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from benchmarks.machine import describe, today

if TYPE_CHECKING:
    from benchmarks.contenders import Contender

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("ours", "ours padded", "padded")
SAMPLES = 256
STEPS = 8  # of an epoch
MOST_CALLS, LEAST_SECONDS = 3, 10.0
Measure = Literal["train", "evaluate"]
MEASURES: tuple[Measure, ...] = ("train", "evaluate")


@dataclass(frozen=True)
class Case:
    """One column on one shape; a `quick` case takes single steps."""

    shape: str
    backbone: str
    threads: int
    quick: bool
    column: str = ""


Timing = dict[str, float]  # samples, positions and seconds of a measure


class Measured(TypedDict):
    """One column in one round."""

    model_mib: float
    train: Timing
    evaluate: Timing


Round = dict[str, Measured]  # by column


class Summary(TypedDict):
    """Medians over rounds by column, and ratios by measure and column; with every round."""

    shape: str
    vocabulary: int
    columns: dict[str, Measured]
    ratios: dict[str, dict[str, dict[str, float]]]
    rounds: list[Round]


def anonymous() -> int:
    """This process's anonymous resident memory, bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest anonymous memory inside the block, as the only entry of the list."""
    peak, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measure(case: Case) -> Measured:
    """One column of one case, in this process."""
    import torch

    from benchmarks.contenders import build
    from benchmarks.shapes import SHAPES, make_samples

    torch.set_num_threads(case.threads)
    shape = SHAPES[case.shape]
    samples = make_samples(shape, SAMPLES)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pools
    before = anonymous()
    contender = build(case.column, shape, samples, Path(case.backbone))
    built, step = anonymous(), iter(range(10**6))
    steps, seconds = (1, 0.0) if case.quick else (STEPS, LEAST_SECONDS)
    for _ in range(2):
        contender.step(next(step))

    def epoch() -> int:
        return sum(contender.step(next(step)) for _ in range(steps))

    train = _timed(epoch, contender, seconds)
    with peak_memory() as peak:
        contender.step(next(step))
    train["peak_mib"] = (peak[0] - before) / 2**20
    with peak_memory() as peak:  # warms up too
        contender.evaluate()
    evaluate = _timed(contender.evaluate, contender, seconds / 2)
    evaluate["peak_mib"] = (peak[0] - before) / 2**20
    return {"model_mib": (built - before) / 2**20, "train": train, "evaluate": evaluate}


def _timed(call: Callable[[], int], contender: Contender, seconds: float) -> Timing:
    """Medians over calls: one, and up to MOST_CALLS while they take less than `seconds`."""
    wall: list[float] = []
    cpu: list[float] = []
    rates: list[float] = []
    positions, samples = contender.positions, 0
    while not wall or (len(wall) < MOST_CALLS and sum(wall) < seconds):
        began, began_cpu = time.perf_counter(), time.process_time()
        n = call()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
        rates.append(n / wall[-1])
        samples += n
    per_sample = (contender.positions - positions) / samples
    rate = statistics.median(rates)
    return {
        "samples_per_second": rate,
        "positions_per_second": rate * per_sample,
        "positions_per_sample": per_sample,
        "cpu_seconds_per_sample": sum(cpu) / samples,
        "wall_seconds_per_sample": sum(wall) / samples,
        "calls": len(wall),
    }


def run_case(case: Case) -> Measured:
    """:func:`measure` in a fresh process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        command = [sys.executable, "-m", "benchmarks.throughput", "--case", json.dumps(asdict(case)), output.name]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case.column} on {case.shape} failed:\n{done.stderr[-3000:]}")
        result: Measured = json.load(output)
    return result


def ratios(rounds: list[Round], measure: Measure, other: str, key: str) -> dict[str, float]:
    """How many times faster ours is than `other`, within each round: median, smallest, largest."""
    if key == "samples_per_second":
        found = [r["ours"][measure][key] / r[other][measure][key] for r in rounds]
    else:
        found = [r[other][measure][key] / r["ours"][measure][key] for r in rounds]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def summarise(shape: str, vocabulary: int, rounds: list[Round]) -> Summary:
    """Medians over the rounds of every column, and the ratios."""
    row: Summary = {"shape": shape, "vocabulary": vocabulary, "columns": {}, "ratios": {}, "rounds": rounds}
    for column in COLUMNS:
        results = [r[column] for r in rounds]
        train, evaluate = (
            {key: statistics.median(result[measure][key] for result in results) for key in results[0][measure]}
            for measure in MEASURES
        )
        model_mib = statistics.median(result["model_mib"] for result in results)
        row["columns"][column] = {"model_mib": model_mib, "train": train, "evaluate": evaluate}
    for measure in MEASURES:
        for other in COLUMNS[1:]:
            row["ratios"][f"{measure}, {other}"] = {
                key: ratios(rounds, measure, other, key)
                for key in ("samples_per_second", "cpu_seconds_per_sample", "positions_per_sample", "peak_mib")
            }
    return row


def show(rows: list[Summary]) -> str:
    head = (
        f"{'':28} {'column':12} {'samples/s':>10} {'positions':>10} {'peak MiB':>9}   ours is faster by (least to most)"
    )
    lines = [head]
    for row in rows:
        for measure in MEASURES:
            for column in COLUMNS:
                values = row["columns"][column][measure]
                line = f"{row['shape']:7} {row['vocabulary']:7} {measure:12} {column:12} {values['samples_per_second']:10.1f}"
                line += f" {values['positions_per_sample']:10.1f} {values['peak_mib']:9.0f}"
                if column != "ours":
                    ratio = row["ratios"][f"{measure}, {column}"]["samples_per_second"]
                    line += f"   {ratio['median']:.1f} ({ratio['least']:.1f} to {ratio['most']:.1f})"
                lines.append(line)
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        Path(sys.argv[3]).write_text(json.dumps(measure(Case(**json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="meld,mosei,simsv2")
    parser.add_argument("--vocab", default="32768,151936")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of single steps: to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from benchmarks.shapes import make_backbone

    rows = []
    with tempfile.TemporaryDirectory() as work:
        for vocabulary in map(int, args.vocab.split(",")):
            backbone = make_backbone(Path(work) / str(vocabulary), vocabulary)
            for shape in args.shapes.split(","):
                rounds: list[Round] = []
                for _ in range(1 if args.quick else args.rounds):
                    case = Case(shape, str(backbone), args.threads, args.quick)
                    rounds.append({column: run_case(replace(case, column=column)) for column in COLUMNS})
                rows.append(summarise(shape, vocabulary, rounds))
                print(show(rows[-1:]), flush=True)
    print("\n" + show(rows))
    if args.out:
        report = {
            "date": today(),
            "command": "python -m benchmarks.throughput " + " ".join(sys.argv[1:]),
            "machine": describe("torch", "transformers", "peft"),
            "load_average_at_end": [round(n, 1) for n in os.getloadavg()],
            "threads": args.threads,
            "rows": rows,
        }
        writing = args.out.with_suffix(".writing")
        writing.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        writing.replace(args.out)


if __name__ == "__main__":
    main()
