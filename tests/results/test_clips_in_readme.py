"""README's four commands from clips to answers, as they are written there; only the backbone is another one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from tests.distributed.processes import ROOT, environment
from tests.features.clips import make_clip, write_lines

SMALL = (
    "model.backbone.name=tiny model.backbone.tiny.vocab_size=300 model.backbone.quantization=none train.precision=fp32"
)
SHORT = (
    "train.steps=2 train.global_batch=4 train.eval_every=null track.mlflow=false track.report=false train.probe=false"
)


def commands() -> list[list[str]]:
    """The section's commands, without the program's name."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("## From clips to answers")[2].partition("\n## ")[0]
    )
    return [shlex.split(line.strip())[1:] for line in section.splitlines() if line.startswith("    egmf ")]


def test_from_clips_to_answers(tmp_path: Path) -> None:
    for k in range(3):
        make_clip(tmp_path / f"{k}.mp4", 0.6, 120 + 150 * k)
    splits = ["train"] * 4 + ["valid"] * 2 + ["test"] * 2
    labels = ("calm", "tense", "unsure")
    rows = [
        {"clip": f"{k % 3}.mp4", "text": f"text {k}", "label": labels[k % 3], "split": split}
        for k, split in enumerate(splits)
    ]
    write_lines(tmp_path / "clips.jsonl", rows)
    write_lines(tmp_path / "new-clips.jsonl", [{"id": "new", "clip": "1.mp4", "text": "I told you so."}])
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nkind: classification\nlabels: [calm, tense, unsure]\nlanguage: en\n", encoding="utf-8"
    )
    steps = commands()
    assert [step[0] for step in steps] == ["extract", "prepare", "train", "predict"]
    for step in steps:
        words = [*step, *SMALL.split(), *SHORT.split()] if step[0] == "train" else step
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *words],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    (answer,) = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["id"] == "new"
    assert answer["prediction"] in labels
