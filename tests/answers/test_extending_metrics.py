"""The chapter on metrics of docs/extending.md: its two blocks, put into a copy of the program, are a new metric everywhere."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from tests.distributed.fork_server import run
from tests.distributed.processes import ROOT, environment

TASK = "{name: mine, kind: classification, labels: ['yes', 'no', maybe], select: kappa}"
PREPARE = """
from pathlib import Path
from tests.toy import toy_source
from trainer.data.preparation.prepare import prepare_source
from trainer.tasks import get_task

sizes = {"train": 48, "valid": 29, "test": 31}
prepare_source(get_task("mine.yaml"), toy_source("mine.yaml", sizes), Path("mine"))
"""


def python(copy: Path, *arguments: str) -> str:
    """Python in the copy, whose trainer and launch come first."""
    command = [sys.executable, *arguments]
    paths = {"PYTHONPATH": f"{copy}:{ROOT}"}
    done = run(command, env=environment(**paths), cwd=copy, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(copy: Path, name: str, *overrides: str) -> Path:
    small = (
        "task=mine.yaml", f"data.path={copy}/mine", "model.backbone.tiny.vocab_size=400", "train.global_batch=8", "train.steps=6",
        "train.eval_every=2", "train.log_every=1", "train.probe=false", "track.mlflow=false", "track.system_metrics=false",
        "track.report=false",
    )  # fmt: skip
    python(copy, "-m", "trainer", "train", f"{copy}/configs/tiny.yaml", *small, *overrides, "--out", str(copy / name))
    return copy / name


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the page's metric, and a dataset of a task that selects by it."""
    folder = tmp_path_factory.mktemp("metric")
    for name in ("trainer", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    chapter = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split("## A metric\n")[1].split("\n## ")[0]
    formula, entry = re.findall(r"```(?:python)?\n(.*?)```", chapter, re.S)
    table = folder / "trainer/metric_table.py"
    with (folder / "trainer/metric_formulas.py").open("a", encoding="utf-8") as formulas:
        formulas.write(f"\n\n{formula}")
    text = table.read_text(encoding="utf-8").replace("    accuracy,\n", "    accuracy,\n    cohen_kappa,\n", 1)
    end = text.index("    ),\n)", text.index("EMOTION = Family("))
    table.write_text(f"{text[:end]}{entry}{text[end:]}", encoding="utf-8")
    (folder / "mine.yaml").write_text(TASK)
    python(folder, "-c", PREPARE)
    return folder


def test_the_metric_is_scored_selects_and_is_compared(copy: Path) -> None:
    trained = train(copy, "run")
    rows = pd.read_parquet(trained / "predictions/test.parquet")
    expected = cohen_kappa_score(rows["label"], rows["prediction"])
    scores = json.loads((trained / "metrics.json").read_text())["test"]["mine"]
    assert scores["kappa"] == pytest.approx(expected, abs=1e-12)
    command = ("score", "--task", "mine.yaml", str(trained / "predictions/test.parquet"), "--json")
    assert json.loads(python(copy, "-m", "trainer", *command))["kappa"] == scores["kappa"]

    journal = [json.loads(line) for line in (trained / "journal.jsonl").read_text().splitlines()]
    validations = {
        line["step"]: line["metrics"]["valid/kappa"] for line in journal if "valid/kappa" in line.get("metrics", {})
    }
    assert len(validations) == 3
    chosen = int((trained / "checkpoints/best").read_text().strip().removeprefix("step-"))
    assert validations[chosen] == max(validations.values())

    other = train(copy, "other", "train.lr.fusion=0.01")
    command = ("compare", str(trained), str(other), "--metric", "kappa", "--json")
    found: dict[str, Any] = json.loads(python(copy, "-m", "trainer", *command))
    (difference,) = found["differences"]
    reference = json.loads((other / "metrics.json").read_text())["test"]["mine"]["kappa"]
    assert difference["metric"] == "kappa"
    assert abs(difference["value"]) == pytest.approx(abs(reference - scores["kappa"]), abs=1e-12)
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_the_page_of_metrics_shows_it(copy: Path) -> None:
    shutil.copy(ROOT / "docs/metrics.md", copy / "metrics.md")
    python(copy, "-m", "trainer.answers.metrics_page", "metrics.md")
    assert "| `kappa` | Cohen's κ | higher | agreement beyond chance |" in (copy / "metrics.md").read_text(
        encoding="utf-8"
    )
