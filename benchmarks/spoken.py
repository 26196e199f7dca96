"""Can clips be learned from? The generated corpus `spoken` from its media files, by the basic recipe and `configs/spoken.yaml`.

Test accuracy by kind of the model with all streams, and of models trained without sound, without pictures, and without both; two labels, so
chance is 0.5. The kinds are in trainer/data/generated/spoken.py.

    python -m benchmarks.spoken --out benchmarks/results/spoken.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from benchmarks.frame_rate import accuracy
from benchmarks.machine import describe, today
from trainer.data.generated.spoken import SIZES, generate_clips
from trainer.shipped import shipped_folder

EGMF = [sys.executable, "-m", "trainer"]
VARIANTS = {
    "full": ("text", "audio", "video"),
    "without audio": ("text", "video"),
    "without video": ("text", "audio"),
    "text only": ("text",),
}


class Row(TypedDict):
    """One variant: test accuracy by kind and of all ("all"), mean over the seeds, and of each seed; seconds of its trainings."""

    variant: str
    mean: dict[str, float]
    seeds: list[dict[str, float]]
    seconds: list[float]


def run(command: Sequence[str]) -> float:
    """Seconds that the command takes.

    Raises:
        SystemExit: it fails; with the end of what it said.
    """
    started = time.monotonic()
    done = subprocess.run([*EGMF, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return time.monotonic() - started


def train(data: Path, out: Path, variant: str, seed: int) -> tuple[dict[str, float], float]:
    seconds = run(
        [
            "train", str(shipped_folder() / "spoken.yaml"), "--out", str(out), f"data.path={data}", f"train.seed={seed}",
            f"model.fusion.modalities=[{','.join(VARIANTS[variant])}]", "track.mlflow=false", "track.report=false",
            "track.system_metrics=false", "eval.splits=[valid,test]",
        ]
    )  # fmt: skip
    return accuracy(out), seconds


def measure(data: Path, folder: Path, seeds: int) -> list[Row]:
    found: dict[str, list[tuple[dict[str, float], float]]] = {variant: [] for variant in VARIANTS}
    for seed in range(seeds):
        for variant, runs in found.items():
            runs.append(train(data, folder / f"run-{variant.replace(' ', '-')}-{seed}", variant, seed))
            print(variant, seed, json.dumps(runs[-1]), flush=True)
    return [
        {
            "variant": variant,
            "mean": {kind: statistics.mean(scores[kind] for scores, _ in runs) for kind in runs[0][0]},
            "seeds": [scores for scores, _ in runs],
            "seconds": [round(seconds, 1) for _, seconds in runs],
        }
        for variant, runs in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, help="where clips, arrays and runs go, and are found again; default: a temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        started = time.monotonic()
        manifest = generate_clips(folder / "clips", workers=args.workers)
        generation = time.monotonic() - started
        extract = ["extract", str(manifest), "--recipe", "basic", "--workers", str(args.workers)]
        extraction = run([*extract, "--out", str(folder / "arrays")])
        preparation = run(["prepare", "spoken", "--source", str(folder / "arrays"), "--out", str(folder / "data")])
        rows = measure(folder / "data", folder, args.seeds)
    report = {
        "date": today(),
        "command": f"python -m benchmarks.spoken --seeds {args.seeds} --workers {args.workers}",
        "machine": describe("av", "librosa", "ai-edge-litert", "scikit-image", "torch", "transformers"),
        "clips": SIZES,
        "chance": 0.5,
        "seconds": {
            "generation": round(generation, 1),
            "extraction": round(extraction, 1),
            "preparation": round(preparation, 1),
        },
        "rows": rows,
    }
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Test accuracy by kind, a row for each variant, as Markdown."""
    kinds = list(rows[0]["mean"])
    lines = [f"| trained with | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for row in rows:
        cells = [f"{row['mean'][kind]:.3f}" for kind in kinds]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
