"""A small run whose data come from clips by a recipe: low and high tones, with and without pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

from typer.testing import CliRunner

from tests.distributed.processes import ROOT, egmf
from tests.features.clips import SMALL, make_clip, make_wav, write_lines
from trainer.cli import app

TASK = "name: tones\nkind: classification\nlabels: [low, high]\nlanguage: en\n"
STEPS = (
    "train.steps=2", "model.backbone.tiny.vocab_size=300", "train.global_batch=8", "train.micro_batch=4", "eval.batch=4",
    "data.history=1", "track.mlflow=false", "track.report=false",
)  # fmt: skip


def make_tones(folder: Path) -> Path:
    """Clips with labels in `folder`, and what `egmf prepare` and `egmf train` made of them: `data` and `run`."""
    rows = []
    for k in range(18):
        label, name = ("low", "high")[k % 2], f"{k}.mp4"
        if k < 4:
            make_clip(folder / name, 0.5 + k / 10, 120 + 200 * (k % 2))
        elif k % 3 == 1:
            name = f"{k}.wav"
            make_wav(folder / name, 0.4 + k / 50, 120 + 200 * (k % 2))
        else:
            shutil.copy(folder / f"{k % 4}.mp4", folder / name)
        split = "train" if k < 10 else "valid" if k < 14 else "test"
        rows.append(
            {
                "id": f"c{k}",
                "clip": name,
                "text": f"number {k}",
                "label": label,
                "split": split,
                "dialogue": f"d{k // 3}",
                "turn": k % 3,
            }
        )
    write_lines(folder / "all.jsonl", rows)
    (folder / "tones.yaml").write_text(TASK)
    (folder / "small.yaml").write_text(SMALL)
    words = [
        "prepare",
        "tones",
        "--task",
        f"{folder}/tones.yaml",
        "--clips",
        f"{folder}/all.jsonl",
        "--recipe",
        f"{folder}/small.yaml",
    ]
    made = CliRunner().invoke(app, [*words, "--out", f"{folder}/data", "--workers", "2"], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    done = egmf(
        "train",
        f"{ROOT}/configs/tiny.yaml",
        *STEPS,
        f"task={folder}/tones.yaml",
        f"data.path={folder}/data",
        "--out",
        f"{folder}/run",
    )
    assert done.returncode == 0, done.stderr
    return folder
