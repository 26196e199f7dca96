"""The metric that chooses the checkpoint: set for a run, recorded, changed when a run goes on; runs of older versions by signs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import mean_absolute_error

from tests.distributed.processes import egmf
from tests.run.older import stopped_run
from tests.run.test_older_runs import LAST, continue_run
from tests.toy import toy_source
from trainer.checkpoint.state import read_state
from trainer.data.dataset import open_dataset
from trainer.data.preparation.prepare import prepare_source
from trainer.distributed.world import World
from trainer.results.compare.sources.from_folders import run_from_folder
from trainer.results.report.report import write_report
from trainer.results.run_folder import read_run
from trainer.run.saved import open_run
from trainer.tasks import get_task

ALONE = World(0, 1, torch.device("cpu"))
TASK = {"name": "own", "kind": "regression", "grid": {"low": 1.0, "high": 5.0, "step": 0.25}}
SMALL = (
    "model.backbone.tiny.vocab_size=400", "train.global_batch=8", "train.steps=6", "train.eval_every=2", "train.log_every=1",
    "train.probe=false", "track.mlflow=false", "track.system_metrics=false", "track.report=false",
)  # fmt: skip


def train(folder: Path, *overrides: str) -> Any:
    where = (f"task={folder}/own.yaml", f"data.path={folder}/data/{{task}}", *SMALL, *overrides)
    return egmf("train", "configs/tiny.yaml", *where, "--out", str(folder / "run"))


def define(folder: Path, **more: Any) -> Path:
    (folder / "own.yaml").write_text(yaml.safe_dump({**TASK, **more}))
    return folder / "own.yaml"


def prepare(folder: Path, *, saved: bool = False) -> None:
    task, name = get_task(str(folder / "own.yaml"), saved=saved), str(folder / "plain.yaml")
    Path(name).write_text(yaml.safe_dump(TASK))
    prepare_source(task, toy_source(name, {"train": 48, "valid": 29, "test": 31}), folder / "data/own")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an own task of numbers from 1 to 5, which selects by what its config says."""
    folder = tmp_path_factory.mktemp("selecting")
    define(folder)
    prepare(folder)
    done = train(folder, "eval.select=mae")
    assert done.returncode == 0, done.stderr
    return folder


def validations(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return {
        line["step"]: line["metrics"][f"valid/{key}"] for line in lines if f"valid/{key}" in line.get("metrics", {})
    }


@pytest.mark.distributed
def test_a_runs_config_sets_the_metric_and_the_run_says_so(trained: Path) -> None:
    run = trained / "run"
    by_mae = validations(run, "mae")
    assert len(by_mae) == 3
    assert int((run / "checkpoints/best").read_text().removeprefix("step-")) == min(by_mae, key=by_mae.__getitem__)
    assert json.loads((run / "run.json").read_text())["select"] == {"own": "mae"}
    state = read_state(run / "checkpoints/step-00000006").selection
    assert state.metrics == {"own": "mae"}
    assert {int(name[5:]): values["own"] for name, values in state.validations.items()} == by_mae

    scores = json.loads((run / "metrics.json").read_text())["test"]["own"]
    assert list(scores)[:7] == ["n", "invalid_rate", "ccc", "corr", "mae", "rmse", "r2"]
    rows = pd.read_parquet(run / "predictions/test.parquet")
    assert scores["mae"] == pytest.approx(mean_absolute_error(rows["label"], rows["prediction"]), abs=1e-12)
    assert rows["answer"].map(lambda text: re.fullmatch(r"[1-5]\.(00|25|50|75)", text) is not None).all()

    read = read_run(run)
    assert read.selected() == {"own": sorted(by_mae.items())}
    write_report(run)
    assert "mae (selects)" in (run / "report.html").read_text()
    assert run_from_folder(run, ["test"]).tasks["own"].select == "mae"


@pytest.mark.distributed
def test_a_wrong_name_is_refused_before_anything_starts(trained: Path) -> None:
    done = train(trained, "eval.select={own: acc, meld: uar}", "train.resume=never")
    assert done.returncode == 1
    assert "eval.select of own: select='acc' is none of the metrics of family 'regression'" in done.stderr
    assert "eval.select.meld: the run has no such task" in done.stderr
    assert json.loads((trained / "run/run.json").read_text())["state"] == "done"


@pytest.mark.distributed
def test_a_run_by_signs_of_an_older_version_opens_and_a_new_one_is_refused(trained: Path, tmp_path: Path) -> None:
    """The task's file and the dataset's record have the family that the version before gave to every grid."""
    run = tmp_path / "run"
    run.symlink_to(trained / "run")
    own = define(tmp_path, family="mosei")
    prepare(tmp_path, saved=True)
    assert open_dataset(tmp_path / "data/own").task.select == "non0_f1"
    opened = open_run(run, ALONE, [f"task={own}", "eval.select={}"], data=str(tmp_path / "data/{task}"))
    table, metrics = opened.evaluate("test")
    assert metrics["own"]["mae"] == json.loads((run / "metrics.json").read_text())["test"]["own"]["mae"]  # type: ignore[typeddict-item]
    for key in ("has0_acc", "non0_f1", "acc5", "acc7"):
        assert metrics["own"][key] is None  # type: ignore[literal-required]
    assert len(table) == 31

    refused = train(tmp_path, "train.resume=never")
    assert refused.returncode == 1
    assert "Write family: regression" in refused.stderr


@pytest.mark.distributed
def test_the_report_of_an_older_run_shows_the_metrics_it_had(trained: Path, tmp_path: Path) -> None:
    """Its file of the task names no family, so that this version would take another one than that of the run's scores."""
    own = define(tmp_path, family="mosei")
    prepare(tmp_path, saved=True)
    define(tmp_path)
    run = tmp_path / "older"
    run.mkdir()
    config = yaml.safe_load((trained / "run/config.yaml").read_text())
    config |= {"task": str(own), "data": {**config["data"], "path": str(tmp_path / "data/{task}")}}
    del config["eval"]["select"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    record = json.loads((trained / "run/run.json").read_text())
    del record["select"]
    record["data"] = {"own": open_dataset(tmp_path / "data/own").fingerprint}
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.json").write_text(
        json.dumps({"checkpoint": "step-00000002", "test": {"own": {"non0_f1": 1.0, "mae": 0.5}}})
    )
    read = read_run(run)
    assert (read.tasks["own"].family, read.tasks["own"].select) == ("mosei", "non0_f1")
    write_report(run)
    assert "non0_f1 (selects)" in (run / "report.html").read_text()


@pytest.mark.distributed
def test_a_run_that_goes_on_by_another_metric_chooses_anew(tmp_path: Path) -> None:
    run = stopped_run("zero2", tmp_path)
    assert read_state(run / LAST).selection.metrics == {}  # of version 0.1.0, by wf1 and acc2
    done = continue_run(run, "eval.select.meld=ua")
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run}/{LAST}" in done.stderr
    assert re.search(r"chosen\s+so\s+far:\s+meld\s+by\s+wf1\.", done.stderr)
    state = read_state(run / "checkpoints/step-00000008").selection
    assert state.metrics == {"meld": "uar", "simsv2": "acc2"}
    assert list(state.validations) == ["step-00000008"]
    assert (run / "checkpoints/best").read_text().strip() == "step-00000008"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["checkpoint"] == "step-00000008"
    assert state.validations["step-00000008"]["meld"] == pytest.approx(metrics["valid"]["meld"]["uar"], rel=1e-3)
