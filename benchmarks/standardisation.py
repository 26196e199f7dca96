"""What standardised features are worth on real data: the tiny backbone, features as published against features by mean and deviation.

- `youtube`, `pom` (pliang279/MFN `new_data`): sequences of 20 steps of COVAREP audio and FACET video, padded in front with
  zeros, which are taken away here; no words, so every text is "clip". Three sentiments; of 17 ratings from 1 to 7 the first, and
  the ninth (`pom9`), of which a support vector regression over means and deviations of the steps knows most on the valid split.
  125 of the 173 training clips of `youtube` are zeros only: nothing can be learnt of them.
- `mosi` (CMU-MOSI): text, and one vector of audio and of video an utterance. Its video was made by a network that had seen most
  of the test utterances' labels: it shows whether a stream is read, and nothing about sentiment.

Each with and without `model.fusion.standardise`, by `egmf sweep`, otherwise as `configs/tiny.yaml`; scores of the test split.

    python -m benchmarks.standardisation FOLDER_WITH_MFN_AND_MOSI --out benchmarks/results/standardisation.json
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import yaml

from benchmarks.machine import describe, today
from trainer.data.preparation.feature_summary import standardisation_lines
from trainer.data.preparation.prepare import prepare
from trainer.shipped import shipped_folder
from trainer.tasks import get_task

EGMF = [sys.executable, "-m", "trainer"]
SENTIMENTS = (
    "neutral",
    "positive",
    "negative",
)  # the order of the one-hot columns is not published; no metric hangs on it
TASKS = {
    "youtube": {"name": "youtube", "kind": "classification", "labels": list(SENTIMENTS)},
    "pom": {"name": "pom", "kind": "regression", "grid": {"low": 0.5, "high": 7.0, "step": 0.5}},
    "pom9": {"name": "pom9", "kind": "regression", "grid": {"low": 0.5, "high": 7.0, "step": 0.5}},
}
RATING = {"pom": 0, "pom9": 8}
METRICS = {"youtube": ("acc", "wf1"), "pom": ("corr", "mae"), "pom9": ("corr", "mae"), "mosi": ("corr", "mae")}
CONFIG = {
    "extends": "tiny.yaml",
    "model": {"fusion": {"dropout": 0.1}, "backbone": {"gradient_checkpointing": False}},
    "train": {"global_batch": 16, "micro_batch": 16, "probe": False},
    "eval": {"splits": ["test"]},
    "track": {"mlflow": False, "report": False, "system_metrics": False},
}


class Score(TypedDict):
    """Mean and deviation (n - 1) over the seeds, and each seed's value."""

    mean: float
    std: float
    seeds: list[float]


class Measured(TypedDict):
    """One data set: what `egmf data show` says of its features, and metric -> score without and with standardisation."""

    features: list[str]
    raw: dict[str, Score]
    standardised: dict[str, Score]


def sequences(path: Path, task: str) -> Iterator[tuple[dict[str, object], dict[str, np.ndarray]]]:
    """Samples of MFN's arrays; the steps in front that are 0 in both streams are padding."""
    arrays = np.load(path, allow_pickle=False)
    for split in ("train", "valid", "test"):
        for i, answer in enumerate(arrays[f"y_{split}"]):
            streams = {m: arrays[f"{m}_{split}"][i] for m in ("audio", "video")}
            said = np.flatnonzero(np.logical_or(*(stream.any(1) for stream in streams.values())))
            first = int(said[0]) if len(said) else len(streams["audio"])
            sample: dict[str, object] = {"id": f"{split}{i}", "split": split, "text": "clip"}
            sample |= (
                {"label": SENTIMENTS[int(answer.argmax())]}
                if task == "youtube"
                else {"target": round(float(answer[RATING[task]]), 4)}
            )
            yield sample, {m: stream[first:] for m, stream in streams.items() if first < len(stream)}


def utterances(folder: Path) -> Iterator[tuple[dict[str, object], dict[str, np.ndarray]]]:
    """Samples of CMU-MOSI, one frame each."""
    arrays = np.load(folder / "features.npz", allow_pickle=False)
    with (folder / "mosi.csv").open(encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            split = {"dev": "valid", "val": "valid"}.get(row["split"], row["split"])
            sample = {"id": row["id"], "split": split, "text": row["text"].lower(), "target": float(row["label"])}
            yield sample, {m: arrays[m][i][None] for m in ("audio", "video")}


def write_source(real: Path, name: str, folder: Path) -> Path:
    """Write one's own data from the published arrays, features beside `samples.jsonl`; the latter's path."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    source = utterances(real / "mosi") if name == "mosi" else sequences(real / "mfn" / f"{name.rstrip('9')}.npz", name)
    lines = []
    for sample, streams in source:
        for modality, values_TF in streams.items():
            place = f"clips/{sample['id']}-{modality}.npy"
            np.save(folder / place, values_TF)
            sample[modality] = place
        lines.append(json.dumps(sample))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "samples.jsonl"


def convert(real: Path, name: str, folder: Path) -> list[str]:
    """Write one's own data from the published arrays, prepare them, and say what the features are like."""
    samples = write_source(real, name, folder)
    if name != "mosi":
        (folder / "task.yaml").write_text(yaml.safe_dump(TASKS[name]))
    task = get_task("mosi" if name == "mosi" else str(folder / "task.yaml"))
    return standardisation_lines(prepare(task, [samples], folder / "data").record)


def run(words: Sequence[str], say: bool = False) -> None:
    done = subprocess.run([*EGMF, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"egmf {' '.join(words)}: {done.stderr[-3000:]}")
    if say:
        print(done.stdout)


def measure(
    name: str, folder: Path, steps: int, seeds: int, parallel: int
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Test scores over the seeds, without and with standardisation."""
    config = {**CONFIG, "extends": str(shipped_folder() / "tiny.yaml")}
    config["task"] = "mosi" if name == "mosi" else str(folder / "task.yaml")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    loss = f"train.regression_loss={float(name in RATING)}"
    overrides = [loss, f"data.path={folder / 'data'}", f"train.steps={steps}", f"train.eval_every={steps // 3}"]
    chosen = ["--seeds", ",".join(map(str, range(seeds))), "--set", "model.fusion.standardise=false,true"]
    run(
        [
            "sweep",
            str(folder / "run.yaml"),
            *overrides,
            *chosen,
            "--parallel",
            str(parallel),
            "--out",
            str(folder / "runs"),
        ]
    )
    run(["compare", str(folder / "runs"), "--no-log", "--metric", METRICS[name][0]], say=True)
    found: dict[bool, dict[int, dict[str, float]]] = {False: {}, True: {}}
    for path in sorted((folder / "runs").glob("*/metrics.json")):
        used = yaml.safe_load((path.parent / "config.yaml").read_text())
        (scores,) = json.loads(path.read_text())["test"].values()
        found[used["model"]["fusion"]["standardise"]][used["train"]["seed"]] = scores
    raw, standardised = ({key: _score(found[way], key) for key in METRICS[name]} for way in (False, True))
    return raw, standardised


def _score(by_seed: dict[int, dict[str, float]], key: str) -> Score:
    values = [float(by_seed[seed][key]) for seed in sorted(by_seed)]
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1 if len(values) > 1 else 0)),
        "seeds": values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "real", type=Path, help="the folder of mfn/youtube.npz, mfn/pom.npz, mosi/mosi.csv, mosi/features.npz"
    )
    parser.add_argument("--data", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Measured] = {}
    start = time.perf_counter()
    for name in args.data:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            features = convert(args.real, name, folder)
            print("\n".join([name, *features]), flush=True)
            raw, standardised = measure(name, folder, args.steps, args.seeds, args.parallel)
        found[name] = {"features": features, "raw": raw, "standardised": standardised}
        for key in METRICS[name]:
            pair = " against ".join(f"{s[key]['mean']:.3f} ± {s[key]['std']:.3f}" for s in (raw, standardised))
            print(f"{name} {key}: {pair} standardised", flush=True)
        if args.out:
            command = f"python -m benchmarks.standardisation FOLDER --data {' '.join(args.data)} --out benchmarks/results/standardisation.json"
            about = {"date": today(), "command": command, "machine": describe("torch", "transformers", "deepspeed")}
            settings = {"steps": args.steps, "seeds": args.seeds, "seconds": round(time.perf_counter() - start)}
            args.out.write_text(json.dumps({**about, **settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
