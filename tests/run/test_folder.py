"""The run folder: one training at a time, and an earlier run put aside rather than mixed in or lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import ROOT, egmf
from tests.toy import prepare_toy
from trainer.distributed.world import World
from trainer.run.folder import archive_previous_run, open_folder

ALONE = World(0, 1, torch.device("cpu"))


def test_a_second_training_in_the_folder_is_refused(tmp_path: Path) -> None:
    with (
        open_folder(tmp_path / "run", ALONE),
        pytest.raises(ValueError, match=r"another training .*process \d+ on"),
        open_folder(tmp_path / "run", ALONE),
    ):
        pass
    with open_folder(tmp_path / "run", ALONE):
        pass


def test_an_earlier_run_is_put_aside(tmp_path: Path) -> None:
    assert archive_previous_run(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name in ("config.yaml", "run.json", "journal.jsonl", "tracking.json", "log.txt"):
        (tmp_path / name).write_text(name)
    aside = archive_previous_run(tmp_path)
    assert aside is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [aside.name, "log.txt"]
    assert (aside / "checkpoints" / "step-00000001").is_dir()
    assert archive_previous_run(tmp_path) is None


@pytest.mark.distributed
@pytest.mark.slow
def test_starting_anew_keeps_what_was_there(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path)
    out = tmp_path / "run"
    words = ("train", f"{ROOT}/configs/tiny.yaml", "--out", str(out), "task=meld", f"data.path={tmp_path}/{{task}}",
             "train.steps=2", "train.global_batch=8", "eval.splits=[valid]", "track.system_metrics=false",
             "track.report=false")  # fmt: skip
    first = egmf(*words)
    assert first.returncode == 0, first.stderr
    before = {name: (out / name).read_bytes() for name in ("run.json", "config.yaml", "metrics.json")}
    refused = egmf(*words, "train.seed=3")
    assert refused.returncode == 1
    assert "train.seed: the checkpoint has 0, this run 3" in refused.stderr
    assert {name: (out / name).read_bytes() for name in before} == before  # a refused start changes nothing
    anew = egmf(*words, "train.seed=3", "train.resume=never")
    assert anew.returncode == 0, anew.stderr
    (aside,) = out.glob("before-*")
    assert {name: (aside / name).read_bytes() for name in before} == before
    assert (aside / "checkpoints/step-00000002/manifest.json").is_file()
    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 3
    assert record["mlflow"]["run_id"] != json.loads(before["run.json"])["mlflow"]["run_id"]
