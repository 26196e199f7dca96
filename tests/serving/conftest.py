"""A small trained run that the tests of serving share; whoever changes it copies it first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.processes import egmf
from tests.toy import prepare_toy
from trainer.distributed.world import World
from trainer.run.saved import SavedRun, open_run

ROOT = Path(__file__).parent.parent.parent
TASKS = ("meld", "simsv2")
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, classification and regression, with histories; its prepared datasets lie beside it, by the tasks' names."""
    folder = tmp_path_factory.mktemp("serving")
    for name in TASKS:
        prepare_toy(name, folder)
    done = egmf(
        "train",
        f"{ROOT}/configs/tiny.yaml",
        "train.steps=3",
        "model.backbone.tiny.vocab_size=400",
        "train.global_batch=8",
        "train.micro_batch=4",
        "data.history=2",
        "eval.batch=4",
        "track.mlflow=false",
        "track.report=false",
        f"task=[{','.join(TASKS)}]",
        f"data.path={folder}/{{task}}",
        "--out",
        str(folder / "run"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def opened(run: Path) -> SavedRun:
    return open_run(run, WORLD)
