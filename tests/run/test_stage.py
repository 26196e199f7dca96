"""One GPU trains at stage 0 where ZeRO 1 or 2 is asked for, and a run keeps the stage at which it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import run_ranks
from tests.toy import prepare_toy
from trainer.config import load_config
from trainer.distributed.deepspeed_config import for_world, zero_stage
from trainer.distributed.world import World
from trainer.tracking.journal import read_journal


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    prepare_toy("meld", folder)
    run_ranks("tests.run.stage_worker", str(folder), str(folder), procs=1, timeout=400)
    return folder


def record(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints" / "step-00000004").glob("model*.safetensors")
    return load_file(file)


def test_a_run_alone_is_a_run_at_stage_0(runs: Path) -> None:
    assert record(runs / "alone")["zero"] == record(runs / "stage0")["zero"] == 0
    assert (
        read_journal(runs / "alone" / "journal.jsonl")["train/loss"]
        == (read_journal(runs / "stage0" / "journal.jsonl")["train/loss"])
    )
    assert load_config(str(runs / "alone" / "config.yaml"), []).train.zero == 2  # what was asked for is kept


def test_a_run_keeps_the_stage_at_which_it_began(runs: Path) -> None:
    assert record(runs / "continued")["zero"] == 0
    assert record(runs / "older")["zero"] == 2
    expected = weights(runs / "alone")
    for name, found in weights(runs / "continued").items():
        assert torch.equal(found, expected[name]), name


def test_a_deterministic_run_is_the_same_run_and_says_so(runs: Path) -> None:
    """On a CPU nothing else is computed; what torch would refuse there shows as an error."""
    assert record(runs / "deterministic")["deterministic"] is True
    assert record(runs / "stage0")["deterministic"] is True  # a CPU repeats anyhow
    expected = weights(runs / "stage0")
    for name, found in weights(runs / "deterministic").items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize(
    ("overrides", "size", "device", "saved", "stage"),
    [
        ((), 1, "cuda", None, 0),
        (("train.zero=1",), 1, "cuda", None, 0),
        ((), 2, "cuda", None, 2),
        ((), 1, "cpu", None, 2),
        (("train.zero=3",), 1, "cuda", None, 3),
        (("train.offload=cpu",), 1, "cuda", None, 2),
        (("deepspeed.zero_optimization.reduce_bucket_size=1000",), 1, "cuda", None, 2),
        ((), 1, "cuda", 2, 2),  # begun on two GPUs, or by an older version
        ((), 2, "cuda", 0, 0),  # begun on one
        (("train.zero=0",), 2, "cuda", 2, 0),  # another run: its checkpoint is refused later
    ],
)
def test_the_stage(overrides: tuple[str, ...], size: int, device: str, saved: int | None, stage: int) -> None:
    config = load_config("meld", list(overrides))
    world = World(0, size, torch.device(device))
    assert zero_stage(for_world(config, world, saved)) == stage
