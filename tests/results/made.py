"""Run folders made without training: prepared toy data, predictions drawn at random, a journal, all in the true formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.toy import prepare_toy
from trainer.answers.metrics import compute
from trainer.answers.prediction_table import COLUMNS, write_predictions
from trainer.config import check_config, dump_config
from trainer.data.dataset import open_dataset
from trainer.tasks import get_task

STEPS, CHOSEN = 40, 20
EXPERTS, MODALITIES = 3, 3


def make_run(out: Path, data: Path, tasks: tuple[str, ...], **changes: Any) -> Path:
    """A finished run of toy `tasks`, whose datasets lie (or are made) in `data`; `changes` go into run.json."""
    rng = np.random.default_rng(7)
    config = check_config(
        {
            "task": list(tasks) if len(tasks) > 1 else tasks[0],
            "data": {"path": f"{data}/{{task}}"},
            "train": {"steps": STEPS},
        }
    )
    (out / "checkpoints" / f"step-{CHOSEN:08d}").mkdir(parents=True)
    (out / "checkpoints" / "best").write_text(f"step-{CHOSEN:08d}")
    (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    results: dict[str, Any] = {"checkpoint": f"step-{CHOSEN:08d}"}
    fingerprints = {}
    for split in ("valid", "test"):
        rows, results[split] = [], {}
        for name in tasks:
            folder = data / name if (data / name).exists() else prepare_toy(name, data)
            opened = open_dataset(folder)
            fingerprints[name] = opened.fingerprint
            made = _rows(name, opened[split], rng)
            rows += made
            results[split][name] = _metrics(name, made)
        table = pd.DataFrame(rows, columns=[*COLUMNS, "target", "value"]).sort_values(["task", "id"], ignore_index=True)
        write_predictions(table, out / "predictions" / f"{split}.parquet")
    (out / "metrics.json").write_text(json.dumps(results))
    record = {
        "state": "done", "started": "2026-03-01T10:00:00+00:00", "ended": "2026-03-01T10:20:00+00:00", "failure": None,
        "tasks": list(tasks), "data": fingerprints, "steps": STEPS, "seed": 0, "device": "cpu", "versions": {"torch": "2.13.0"},
        "git": {"commit": "0123abc", "changed": True}, "command": ["egmf", "train", "c.yaml"],
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps({**record, **changes}))
    write_journal(out / "journal.jsonl", tasks, results["valid"])
    return out


def write_journal(path: Path, tasks: tuple[str, ...], valid: dict[str, Any]) -> None:
    """Loss, rates and gates at every step, step 5 skipped, a spike at step 9, a validation every tenth step."""
    lines: list[dict[str, Any]] = [{"kind": "start", "time": 0.0, "params": {}, "tags": {}}]
    for step in range(1, STEPS + 1):
        metrics = {
            "train/loss": 30.0 / step,
            "train/lr_fusion": 1e-3,
            "train/lr_backbone": 1e-4,
            "train/gradient_norm": 2.0,
        }
        metrics |= {"gate/local": 0.2, "gate/semantic": 0.3, "gate/global": 0.5}
        if step == 5:
            del metrics["train/loss"]
            metrics["train/skipped"] = 1.0
        if step == 9:
            metrics["train/spike"] = 1.0
        lines.append({"step": step, "time": float(step), "metrics": metrics})
        if step % 10 == 0:
            middle = {name: f"{name}/" if len(tasks) > 1 else "" for name in tasks}
            scores = {
                f"valid/{middle[name]}{key}": value - abs(step - CHOSEN) / 1000
                for name in tasks
                for key, value in valid[name].items()
                if isinstance(value, float)
            }
            lines.append({"step": step, "time": float(step), "metrics": scores})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _rows(name: str, view: Any, rng: np.random.Generator) -> list[dict[str, Any]]:
    task = get_task(name)
    answers = task.answers()
    rows = []
    for i in range(len(view)):
        sample = view[i]
        p = rng.dirichlet(np.full(len(answers), 0.5))
        if task.kind == "classification":
            value = float(np.argmax(p))
            label, prediction = task.labels[int(sample.target)], task.labels[int(value)]
        else:
            assert task.grid is not None
            value = float(p @ np.array(task.grid.values))
            label, prediction = float(sample.target), value
        expert, modality = rng.dirichlet(np.ones(EXPERTS)), rng.dirichlet(np.ones(MODALITIES), EXPERTS)
        rows.append(
            {
                "task": name, "id": sample.id, "label": label, "prediction": prediction, "valid": True,
                "answer": answers[int(np.argmax(p))], "probabilities": p.tolist(), "gate_expert": expert.tolist(),
                "gate_modality": modality.tolist(), "kind": ("short", "long")[i % 2] if name == "meld" else None,
                "target": float(sample.target), "value": value,
            }
        )  # fmt: skip
    return rows


def _metrics(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = ([row[key] for row in rows] for key in ("target", "value", "probabilities"))
    target, value, probabilities = map(np.array, columns)
    return compute(get_task(name), target, value, probabilities)
