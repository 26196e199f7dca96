"""Small runs of many kinds, and how two models are compared by what they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.distributed.processes import egmf
from tests.toy import WIDTHS
from trainer.data.dataset import open_dataset
from trainer.distributed.world import World
from trainer.results.predict import Options, predict
from trainer.run.model_parts import OpenedModel

WORLD = World(0, 1, torch.device("cpu"))
SMALL = (
    "train.steps=3", "model.backbone.tiny.vocab_size=400", "model.fusion.width=32", "train.global_batch=8", "train.micro_batch=4",
    "train.probe=false", "eval.batch=4", "track.mlflow=false", "track.report=false", "track.system_metrics=false",
)  # fmt: skip


def train(out: Path, *overrides: str) -> Path:
    """A run of a few steps in the folder `out`."""
    done = egmf("train", "configs/tiny.yaml", *SMALL, *overrides, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def sample_lines(dataset: Path, task: str, folder: Path, question: str | None = None) -> list[dict[str, Any]]:
    """The test samples of a prepared dataset as own data, their features as `.npy` in `folder`."""
    opened = open_dataset(dataset, question=question)
    split = "test" if "test" in opened.splits else opened.splits[0]
    lines = []
    for sample in opened[split]:
        line: dict[str, Any] = {"id": sample.id, "text": sample.text, "task": task, "speaker": sample.speaker}
        line |= {"dialogue": sample.dialogue, "turn": sample.turn}
        for stream in WIDTHS:
            values_TF = getattr(sample, f"{stream}_TF")
            if values_TF is not None:
                line[stream] = str(folder / f"{task}-{sample.id}-{stream}.npy")
                np.save(line[stream], values_TF)
        lines.append(line)
    return lines


def answers(opened: OpenedModel, lines: list[dict[str, Any]], folder: Path, *, gates: bool = True) -> list[Any]:
    """What `egmf predict` writes for these samples, with all probabilities and gate weights."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    told: list[str] = []
    has_gates = gates and opened.parts.model.fusion is not None
    predict(opened, [source], out, Options(probabilities=True, gates=has_gates), report=told.append)
    assert not any("left out" in one for one in told), told
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
