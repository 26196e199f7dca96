"""Finished runs of several seeds and settings made without training: truths shared, answers right with a chosen chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainer.answers.metrics import compute
from trainer.answers.prediction_table import COLUMNS, write_predictions
from trainer.config import RunConfig, dump_config, load_config
from trainer.tasks import get_task
from trainer.tracking.journal import MEDIAN_SPEED, SPEED
from trainer.tracking.tracker import Tracker

KINDS = ("local", "long-range")
FOLDS = ("Ses1", "Ses2", "Ses3", "Ses4", "Ses10")
DAY = "2026-03-01T1{}:00:00+00:00"


def predictions(name: str, quality: float, seed: int, samples: int, *, invalid: float = 0.0) -> pd.DataFrame:
    """A table as `evaluate` makes it: the same ids and truths for every seed, right with the chance `quality`."""
    task = get_task(name)
    same, own = np.random.default_rng(1), np.random.default_rng([2, seed, round(1000 * quality)])
    answers = task.labels or task.grid.values  # type: ignore[union-attr]
    truth = same.integers(len(answers), size=samples)
    hard = same.random(samples) ** 0.3  # a sample's difficulty is the same for all runs
    right = own.random(samples) * 0.5 + hard * 0.5 < quality
    guess = np.where(right, truth, own.integers(len(answers), size=samples))
    valid = own.random(samples) >= invalid
    columns: dict[str, Any] = {
        "task": name,
        "id": [f"s{i:05d}" for i in range(samples)],
        "label": [answers[k] for k in truth],
        "prediction": [answers[k] if v else None for k, v in zip(guess, valid, strict=True)],
        "valid": valid,
        "kind": [KINDS[i % 2] for i in range(samples)],
    }
    return pd.DataFrame(columns).reindex(columns=[*COLUMNS, "target", "value"])


def make_seeded(
    out: Path,
    seed: int = 0,
    quality: float = 0.7,
    overrides: Sequence[str] = (),
    *,
    tasks: Sequence[str] = ("meld",),
    samples: int = 200,
    invalid: float = 0.0,
    hours: int = 2,
    splits: Sequence[str] = ("test", "valid"),
    fingerprint: str = "f" * 64,
    **record: Any,
) -> Path:
    """A run folder with config, record, journal and predictions; `record` goes into run.json."""
    out.mkdir(parents=True)
    (out / "base.yaml").write_text(f"task: {json.dumps(tasks[0] if len(tasks) == 1 else list(tasks))}\n")
    config = load_config(out / "base.yaml", [f"train.seed={seed}", *overrides])
    (out / "base.yaml").unlink()
    (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    for place, split in enumerate(splits):
        table = pd.concat([predictions(n, quality, seed + 100 * place, samples, invalid=invalid) for n in tasks])
        write_predictions(table.reset_index(drop=True), out / "predictions" / f"{split}.parquet")
    whole = {
        "state": "done", "started": DAY.format(0), "ended": DAY.format(hours), "world": 2, "device": "cpu x 1 threads",
        "tasks": list(tasks), "data": dict.fromkeys(tasks, fingerprint), "git": {"commit": "0123abc"},
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps({**whole, **record}))
    lines = [{"step": s, "time": float(s), "metrics": {SPEED: 100.0 + s}} for s in (1, 2, 3)]
    (out / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def make_baseline(
    out: Path,
    name: str = "text",
    quality: float = 0.5,
    *,
    task: str = "meld",
    samples: int = 200,
    splits: Sequence[str] = ("test", "valid"),
    fingerprint: str = "f" * 64,
    **record: Any,
) -> Path:
    """A folder as `egmf baseline` writes it, on the samples of :func:`make_seeded`; `record` goes into run.json."""
    out.mkdir(parents=True)
    scores: dict[str, Any] = {}
    for place, split in enumerate(splits):
        table = predictions(task, quality, 50 + 100 * place, samples)
        write_predictions(table, out / "predictions" / f"{split}.parquet")
        numbers = [_numbers(task, table[column]) for column in ("label", "prediction")]
        scores[split] = {task: compute(get_task(task), *numbers)}
    (out / "metrics.json").write_text(json.dumps(scores))
    modalities = [] if name == "constant" else name.split("-")[0].split("+")
    about = {
        "name": name, "model": "LogisticRegression", "modalities": modalities, "ngrams": "words" if "text" in modalities else None,
        "setting": "C", "value": 1.0, "tried": {}, "data": "data/gone",
    }  # fmt: skip
    whole = {
        "state": "done", "baseline": about, "started": DAY.format(0), "ended": DAY.format(1), "failure": None, "world": 1,
        "device": "cpu x 1 threads", "tasks": [task], "data": {task: fingerprint}, "git": {"commit": "4567def"},
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps({**whole, **record}))
    return out


def make_baseline_folds(
    folder: Path, name: str, quality: float, *, names: Sequence[str] = FOLDS, samples: int = 200, **more: Any
) -> Path:
    """A baseline of each fold of :func:`make_folds`, on the samples of its runs."""
    count = len(names)
    for k, fold_name in enumerate(names):
        fold = {
            "name": fold_name,
            "names": list(names),
            "train": samples * (count - 2) // count,
            "test": samples // count,
        }
        out = make_baseline(folder / f"b-{name}-fold={fold_name}", name, quality, samples=samples, fold=fold, **more)
        for split, part in (("test", k), ("valid", (k + 1) % count)):
            path = out / "predictions" / f"{split}.parquet"
            table = pd.read_parquet(path)
            table[table.index % count == part].to_parquet(path)
    return folder


def _numbers(name: str, cells: pd.Series) -> np.ndarray:
    """Label indices, or the numbers themselves."""
    task = get_task(name)
    return np.array([task.labels.index(cell) if task.labels else cell for cell in cells], float)


def make_two(folder: Path, seeds: Sequence[int] = (1, 2, 3), **more: Any) -> Path:
    """Two groups in `folder`: the whole model, and one without the local expert, which is worse."""
    for seed in seeds:
        make_seeded(folder / f"full-s{seed}", seed, 0.75, **more)
        make_seeded(folder / f"less-s{seed}", seed, 0.6, ["model.fusion.experts=[semantic,global]"], **more)
    return folder


def make_folds(
    folder: Path,
    stem: str,
    quality: float,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (1,),
    names: Sequence[str] = FOLDS,
    samples: int = 200,
    **more: Any,
) -> Path:
    """Runs of a cross-validation: sample i is tested in fold i modulo their number, the next fold validates."""
    count = len(names)
    for seed in seeds:
        for k, name in enumerate(names):
            fold = {
                "name": name,
                "names": list(names),
                "train": samples * (count - 2) // count,
                "test": samples // count,
            }
            run = make_seeded(
                folder / f"{stem}-fold={name}-s{seed}", seed, quality, [f"data.fold={name}", *overrides], samples=samples, fold=fold, **more
            )  # fmt: skip
            for split, part in (("test", k), ("valid", (k + 1) % count)):
                path = run / "predictions" / f"{split}.parquet"
                table = pd.read_parquet(path)
                table[table.index % count == part].to_parquet(path)
    return folder


def track(run: Path, config: RunConfig, uri: str | None = None, experiment: str = "egmf", **tags: str) -> str:
    """Record a made run in MLflow as training does, by default in ``mlflow.db`` beside its folder; the MLflow run's id."""
    config.track.uri, config.track.experiment, config.track.system_metrics = uri, experiment, False
    config.track.tags = tags
    record = json.loads((run / "run.json").read_text())
    (run / "journal.jsonl").unlink()
    tracker = Tracker(config, run, enabled=True)
    about = {"world_size": record["world"], "device": record["device"], "git.commit": record["git"]["commit"]}
    if "fold" in record:
        about |= {"egmf.fold": record["fold"]["name"], "egmf.folds": json.dumps(record["fold"])}
    tracker.start(config, {**about, **{f"data.{name}": print_ for name, print_ in record["data"].items()}})
    for step in (1, 2, 3):
        tracker.metrics({SPEED: 100.0 + step}, step)
    if config.train.seed % 2:  # runs of earlier versions do not say it
        tracker.metrics({MEDIAN_SPEED: 102.0}, 3)
    for path in sorted((run / "predictions").glob("*.parquet")):
        tracker.artifact(path, "predictions")
    tracker.finish(record["state"])
    assert tracker.run_id is not None
    (run / "run.json").write_text(json.dumps({**record, "mlflow": {"uri": tracker.uri, "run_id": tracker.run_id}}))
    return tracker.run_id
