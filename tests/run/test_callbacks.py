"""The hooks of a training: called at their moments, on every rank, with what the run has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_ranks
from tests.toy import prepare_toy
from trainer.tracking.journal import read_journal

STEPS, EVAL_EVERY, SAVE_EVERY = 5, 4, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callbacks")
    prepare_toy("meld", folder)
    run_ranks("tests.run.callbacks_worker", str(folder), str(folder / "run"), timeout=400)
    return folder / "run"


@pytest.fixture(scope="module")
def events(run: Path) -> list[list[list[Any]]]:
    """Of each rank: [hook, its arguments ...]."""
    return [json.loads((run / f"events{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
def test_every_rank_sees_the_same_moments_in_order(events: list[list[list[Any]]]) -> None:
    expected = [["on_train_start", 0]]
    for step in range(1, STEPS + 1):
        expected += [["on_step_scalars"], ["on_step_end", step]]
        if step == STEPS or step % EVAL_EVERY == 0:
            expected += [["on_validation_end", step, ["meld"]]]
        if step == STEPS or step % SAVE_EVERY == 0:
            expected += [["on_save_start", step], ["on_save_end", step, f"step-{step:08d}"]]
    expected += [["on_best_evaluated", "valid", "valid.parquet"], ["on_best_evaluated", "test", "test.parquet"]]
    expected += [["on_train_end"]]
    for rank in events:
        assert [event[:3] for event in rank if event[0] not in ("on_evaluation_progress", "result")] == expected
        assert {event[1] for event in rank if event[0] == "on_evaluation_progress"} == {"valid", "test"}


@pytest.mark.distributed
def test_a_callback_reads_the_step_and_adds_numbers_of_its_own(run: Path, events: list[list[list[Any]]]) -> None:
    losses = dict(read_journal(run / "journal.jsonl")["train/loss"])
    for rank in events:
        results = [event[1] for event in rank if event[0] == "result"]
        assert [result["loss"] for result in results] == [losses[step] for step in range(1, STEPS + 1)]
        assert [result["sum of ranks + 1"] for result in results] == [3.0] * STEPS
        assert [result["mean of ranks"] for result in results] == [0.5] * STEPS


@pytest.mark.distributed
def test_the_documented_callback_records_the_memory_of_both_ranks(run: Path) -> None:
    values = dict(read_journal(run / "journal.jsonl")["system/resident_gib"])
    assert list(values) == list(range(1, STEPS + 1))
    assert all(0.2 < value < 20 for value in values.values())
