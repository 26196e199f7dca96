"""The terminal's view of a run: complete when stdout is no terminal, and as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.processes import egmf


def test_the_terminal_gets_everything_and_nothing_is_cut(unified: Path) -> None:
    done = egmf("show", str(unified), COLUMNS="40")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((unified / "metrics.json").read_text())["test"]
    for words in (
        "unified-run",
        "done",
        "40 of 40",
        "step-00000020",
        "Steps skipped: 1; spikes of the loss: 1.",
        "chosen",
    ):
        assert words in done.stdout, words
    for task, key in (("meld", "wf1"), ("cherma", "macro_f1"), ("simsv2", "mae")):
        assert f"{metrics[task][key]:.4f}" in done.stdout, (task, key)
    for words in (
        "majority class of train",
        "愤怒",
        "semantic",
        "Answered worst: cherma, test",
        "global_batch: 32",
        "0123abc",
    ):
        assert words in done.stdout, words
    assert "…" not in done.stdout


def test_json_has_the_same_content_and_stdout_nothing_else(unified: Path) -> None:
    done = egmf("show", str(unified), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    metrics = json.loads((unified / "metrics.json").read_text())
    assert summary["state"] == "done"
    assert (summary["step"], summary["steps"], summary["checkpoint"]) == (40, 40, "step-00000020")
    assert summary["tasks"]["simsv2"]["scores"]["test"] == metrics["test"]["simsv2"]
    assert summary["tasks"]["meld"]["constant"]["scores"]["acc"] < 1
    assert summary["tasks"]["cherma"]["gates"]["class"][0]["name"] == "愤怒"
    assert summary["tasks"]["meld"]["worst"][0]["text"]
    assert [step for step, _ in summary["validation"]["meld"]] == [10, 20, 30, 40]
    assert summary["config"]["train"]["steps"] == 40
    assert summary["notes"] == []
