"""Constrained or full scores: the same checkpoints evaluated under both, compared by `egmf compare`.

A run is trained once, with the loss of `train.loss`, and its chosen checkpoint answers the test split under
`eval.score=constrained` and `eval.score=full`. Runs of one name are seeds of one training; the two definitions are its two groups.

    egmf sweep configs/demo-single.yaml data.path=WORK/diagnostic --seeds 0,1,2 --out WORK/runs/diagnostic
    python -m benchmarks.score_definitions WORK/runs/diagnostic WORK/runs/meld-text --out benchmarks/results/score-definitions.json
    python -m benchmarks.score_definitions --table benchmarks/results/score-definitions.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, today
from trainer.answers.prediction_table import write_predictions
from trainer.config import dump_config
from trainer.distributed.world import World
from trainer.files import write_json
from trainer.run.saved import open_run

DEFINITIONS = ("full", "constrained")
KEPT = ("acc", "wf1", "non0_f1", "acc2", "mae", "corr", "nll", "ece", "brier")
COPIED = ("run.json", "config.yaml")


def evaluated(run: Path, score: str, out: Path) -> dict[str, Any]:
    """A run folder beside `run`, as if it had been evaluated under this definition; its metrics on the test split."""
    torch.set_num_threads(1)
    opened = open_run(run, World(0, 1, torch.device("cpu")), [f"eval.score={score}"])
    out.mkdir(parents=True)
    for name in COPIED:
        shutil.copy(run / name, out / name)
    (out / "config.yaml").write_text(dump_config(opened.config), encoding="utf-8")
    metrics: dict[str, Any] = {}
    for split in ("valid", "test"):
        table, metrics[split] = opened.evaluate(split)
        write_predictions(table, out / "predictions" / f"{split}.parquet")
    write_json(out / "metrics.json", {"checkpoint": opened.checkpoint.name, **metrics})
    return {task: {key: values.get(key) for key in KEPT if key in values} for task, values in metrics["test"].items()}


def measure(runs: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Both definitions over the seeds of one training: every seed's metrics, and the differences that `egmf compare` finds."""
    seeds: dict[str, list[dict[str, Any]]] = {score: [] for score in DEFINITIONS}
    for run in runs:
        for score in DEFINITIONS:
            seeds[score].append(evaluated(run, score, folder / score / run.name))
            print(run, score, seeds[score][-1], flush=True)
    words = [sys.executable, "-m", "trainer", "compare", str(folder), "--no-log", "--json", "--metric", "all"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    compared = json.loads(done.stdout)
    keys = ("task", "group", "baseline", "metric", "value", "low", "high", "p", "p_corrected")
    return {
        "runs": len(runs),
        "seeds": seeds,
        "differences": [
            {key: d.get(key) for key in keys}
            for d in compared["differences"]
            if d["kind"] == "all" and d["metric"] in KEPT
        ],
    }


def table(results: dict[str, Any]) -> str:
    """Means over seeds under both definitions, and the differences that are significant after correction."""
    lines = ["| training | task | metric | full | constrained | significant |", "|---|---|---|---|---|---|"]
    for name, one in results["trainings"].items():
        full, constrained = one["seeds"]["full"], one["seeds"]["constrained"]
        for task, values in full[0].items():
            for metric in values:
                cells = [_mean([seed[task][metric] for seed in seeds]) for seeds in (full, constrained)]
                ps = [d["p_corrected"] for d in one["differences"] if (d["task"], d["metric"]) == (task, metric)]
                found = [p for p in ps if p is not None]
                known = "not tested" if not found else "yes" if min(found) < 0.05 else "no"
                lines.append(f"| {name} | {task} | {metric} | {cells[0]} | {cells[1]} | {known} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if len(known) == len(values) else "undefined"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", type=Path, nargs="*", help="folders, each with the runs of one training's seeds")
    parser.add_argument("--out", type=Path, help="results; those of other trainings in the file stay")
    parser.add_argument("--table", type=Path, help="print the table of a results file, and measure nothing")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    found: dict[str, Any] = {}
    for training in args.trainings:
        runs = sorted(path.parent for path in training.glob("*/metrics.json"))
        if not runs:
            parser.error(f"{training} holds no finished run")
        with tempfile.TemporaryDirectory() as folder:
            found[training.name] = measure(runs, Path(folder))
    results = {"date": today(), "machine": describe("torch", "transformers"), "trainings": found}
    if args.out is not None:
        known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"trainings": {}}
        results["trainings"] = known["trainings"] | found
        args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
