"""What fewer frames a second cost in accuracy: the diagnostic data, resampled by `egmf prepare --max-rate`, and `configs/demo.yaml`.

The data have 10 frames a second, 48 of audio and of video. Their kinds (docs/diagnostic.md) ask for different resolutions in time. Test
accuracy by kind, over seeds of training; the data are the same.

    python -m benchmarks.frame_rate --out benchmarks/results/frame-rate.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

import pyarrow.parquet as pq

from benchmarks.machine import describe, today
from trainer.data.generated.diagnostic import generate
from trainer.shipped import shipped_folder

EGMF = [sys.executable, "-m", "trainer"]
RATES: tuple[float | None, ...] = (None, 5.0, 2.5)


class Row(TypedDict):
    """One rate: accuracy by kind and of all ("all"), mean and deviation (n - 1) over the seeds, and of each seed."""

    max_rate: float | None
    mean: dict[str, float]
    deviation: dict[str, float]
    seeds: list[dict[str, float]]


def accuracy(run: Path) -> dict[str, float]:
    """Of the test split, by kind."""
    table = pq.read_table(run / "predictions" / "test.parquet", columns=["label", "prediction", "kind"]).to_pydict()
    right = [a == b for a, b in zip(table["label"], table["prediction"], strict=True)]
    kinds = sorted(set(table["kind"]))
    of_kind = {k: [r for r, kind in zip(right, table["kind"], strict=True) if kind == k] for k in kinds}
    return {name: statistics.mean(of) for name, of in {**of_kind, "all": right}.items()}


def train(data: Path, out: Path, seed: int, steps: int) -> dict[str, float]:
    command = [
        *EGMF, "train", str(shipped_folder() / "demo.yaml"), "--out", str(out), f"data.path={data}", f"train.seed={seed}",
        f"train.steps={steps}", "track.mlflow=false", "track.report=false", "track.system_metrics=false", "eval.splits=[valid,test]",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return accuracy(out)


def measure(seeds: int, steps: int) -> list[Row]:
    found: dict[float | None, list[dict[str, float]]] = {max_rate: [] for max_rate in RATES}
    with tempfile.TemporaryDirectory() as folder:
        for max_rate in RATES:
            generate("diagnostic", Path(folder) / f"data-{max_rate}", max_rate=max_rate)
        for seed in range(seeds):
            for max_rate, scores in found.items():
                scores.append(
                    train(Path(folder) / f"data-{max_rate}", Path(folder) / f"run-{max_rate}-{seed}", seed, steps)
                )
                print(max_rate, seed, json.dumps(scores[-1]), flush=True)
    return [
        {
            "max_rate": max_rate,
            "mean": {name: statistics.mean(one[name] for one in scores) for name in scores[0]},
            "deviation": {
                name: statistics.stdev(one[name] for one in scores) if seeds > 1 else 0.0 for name in scores[0]
            },
            "seeds": scores,
        }
        for max_rate, scores in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    rows = measure(args.seeds, args.steps)
    report = {
        "date": today(),
        "command": f"python -m benchmarks.frame_rate --seeds {args.seeds} --steps {args.steps}",
        "machine": describe("torch", "transformers", "peft", "bitsandbytes"),
        "rows": rows,
    }
    print(json.dumps(rows, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
