"""What an earlier version wrote is continued, evaluated and predicted with, as if there had been one version only."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import Field, create_model
from safetensors.torch import load_file

import trainer.checkpoint.identity
import trainer.config
import trainer.saved_config
from tests.distributed.processes import egmf
from tests.run.older import V01, edit_settings, edit_state, stopped_run
from trainer.checkpoint.identity import identify
from trainer.checkpoint.state import CheckpointState, check_fit, read_state
from trainer.checkpoint.weights import CheckpointError
from trainer.config import ConfigError, RunConfig, TrainConfig
from trainer.data.dataset import open_dataset
from trainer.distributed.world import World
from trainer.models.backbone.fingerprint import SOURCE
from trainer.results.predict import Options, predict
from trainer.run.saved import open_run
from trainer.saved_config import saved_config

ALONE = World(0, 1, torch.device("cpu"))
LAST = "checkpoints/step-00000006"


def continue_run(run: Path, *overrides: str, procs: int = 1) -> Any:
    """The command of the older run again; `data.path` may change."""
    config = run.parent / f"{run.name}.yaml"
    config.write_bytes((run / "config.yaml").read_bytes())
    words = ("train",) if procs == 1 else ("launch", "local", "--procs", str(procs))
    return egmf(*words, str(config), "--out", str(run), f"data.path={run.parent}/data/{{task}}", *overrides)


def assert_as_undisturbed(run: Path, whole: Path) -> None:
    weights, expected = (
        load_file(run / "checkpoints/step-00000008/model.safetensors"),
        load_file(whole / "model.safetensors"),
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():  # this version, and other processors, round otherwise
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for split in ("valid", "test"):
        one, two = (pd.read_parquet(place / "predictions" / f"{split}.parquet") for place in (run, whole))
        for table in (one, two):  # labels and numbers share a column of text
            table["number"] = pd.to_numeric(table["prediction"], errors="coerce")
            table.loc[table["number"].notna(), "prediction"] = ""
        pd.testing.assert_frame_equal(one[two.columns], two, rtol=1e-3)
    metrics, before = (json.loads((place / "metrics.json").read_text()) for place in (run, whole))
    assert_known_metrics_equal(metrics, before)


def assert_known_metrics_equal(metrics: Any, before: Any) -> None:
    """Every metric of the older version has its value; newer ones may stand beside them."""
    if isinstance(before, dict):
        assert before.keys() <= metrics.keys()
        for key, value in before.items():
            assert_known_metrics_equal(metrics[key], value)
    elif not isinstance(before, float):
        assert metrics == before
    else:
        assert metrics == pytest.approx(before, rel=1e-3)


@pytest.mark.distributed
def test_a_run_of_version_0_1_is_continued_evaluated_and_predicts(tmp_path: Path) -> None:
    run = stopped_run("zero2", tmp_path)
    done = continue_run(run, "train.log_every=2", "model.backbone.gradient_checkpointing=true")  # both may differ
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run}/{LAST}" in done.stderr
    assert "trained again" not in done.stderr
    assert_as_undisturbed(run, V01 / "zero2-whole")
    assert not read_state(V01 / "zero2-stopped" / LAST).base.startswith(SOURCE)  # as stored
    assert read_state(run / "checkpoints/step-00000008").base.startswith(SOURCE)
    opened = open_run(run, ALONE)
    metrics = json.loads((run / "metrics.json").read_text())
    assert opened.evaluate("test")[1] == metrics["test"]
    lines = [
        json.dumps({"id": s.id, "text": s.text, "task": "meld"}) for s in open_dataset(tmp_path / "data/meld")["test"]
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tally = predict(opened, [source], answers, Options(), report=lambda text: pytest.fail(text))
    assert tally.answered == 8


@pytest.mark.distributed
def test_a_run_that_did_not_know_some_settings_goes_on_on_two_processes(tmp_path: Path) -> None:
    run = stopped_run("zero3", tmp_path)
    edit_settings(run, lambda settings: [settings.pop(key) for key in ("data.sampling", "train.class_weights")])
    edit_settings(run, lambda settings: settings.update({"model.fusion.former": None}))  # known then, and not used
    config = (run / "config.yaml").read_text()
    assert "sampling" not in config
    (run / "config.yaml").write_text(
        config.replace("    former: null\n", "")
    )  # the user's own file is written for this version
    done = continue_run(run, procs=2)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run}/{LAST}" in done.stderr
    assert "model.fusion.former" in done.stderr
    assert_as_undisturbed(run, V01 / "zero3-whole")


def test_a_stopped_run_of_version_0_1_is_evaluated_as_it_is(tmp_path: Path) -> None:
    run = stopped_run("zero2", tmp_path)
    edit_settings(run, lambda settings: settings.update({"model.fusion.former": False}))
    opened = open_run(run, ALONE, data=f"{tmp_path}/data/{{task}}")
    assert opened.checkpoint.name == "step-00000004"
    _, metrics = opened.evaluate("valid")
    validated = read_state(run / LAST).selection.validations["step-00000004"]
    for task, key in (("meld", "wf1"), ("simsv2", "acc2")):
        np.testing.assert_allclose(metrics[task][key], validated[task], rtol=1e-3)


@pytest.mark.parametrize("doubly", [True, False])
def test_another_hash_of_what_is_stored_is_a_warning_where_threads_may_have_made_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, doubly: bool
) -> None:
    run = stopped_run("zero2", tmp_path)
    edit_settings(run, lambda settings: settings.update({"model.backbone.double_quantization": doubly}))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        edit_state(checkpoint, lambda state: state.update({"base": "0" * 64}))
    if not doubly:
        with pytest.raises(CheckpointError, match="was trained on another frozen backbone"):
            open_run(run, ALONE, data=f"{tmp_path}/data/{{task}}")
        return
    with caplog.at_level(logging.WARNING):
        assert open_run(run, ALONE, data=f"{tmp_path}/data/{{task}}").checkpoint.name == "step-00000004"
    assert "hangs on the number of threads and the kind of GPU" in caplog.text


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped run of version 0.1.0; not to be changed."""
    return stopped_run("zero2", tmp_path_factory.mktemp("older"))


def expected_identity(state: CheckpointState, config: RunConfig) -> Any:
    return identify(config, data=state.data, base=state.base, world_size=1)


def test_a_setting_that_a_release_adds_counts_as_its_default(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = create_model("NewTrain", __base__=TrainConfig, invented=(float, 0.25), faster=(bool, Field(False, json_schema_extra={"affects": "execution"})))  # fmt: skip
    newer = create_model("NewConfig", __base__=RunConfig, train=(train, Field(default_factory=train)))
    for module in (trainer.config, trainer.saved_config, trainer.checkpoint.identity):
        monkeypatch.setattr(module, "RunConfig", newer)
    state = read_state(older / LAST)
    config = saved_config(older)
    assert config.train.invented == 0.25  # type: ignore[attr-defined]
    check_fit(state, expected_identity(state, config), older / LAST)
    check_fit(state, expected_identity(state, saved_config(older, ["train.faster=true"])), older / LAST)
    with pytest.raises(CheckpointError, match=r"train\.invented: the checkpoint has 0\.25, this run 0\.5"):
        check_fit(state, expected_identity(state, saved_config(older, ["train.invented=0.5"])), older / LAST)


def test_what_changes_the_training_is_refused_and_what_does_not_is_not(older: Path) -> None:
    state = read_state(older / LAST)
    for free in (
        "train.micro_batch=2",
        "data.layout=padded",
        "train.eval_every=2",
        "eval.mode=generate",
        "track.mlflow=true",
    ):
        check_fit(state, expected_identity(state, saved_config(older, [free])), older / LAST)
    for fixed, words in (
        ("train.label_smoothing=0.2", "train.label_smoothing: the checkpoint has 0.1, this run 0.2"),
        ("data.weights.meld=2", "data.weights.meld: the checkpoint has None, this run 2.0"),
        ("deepspeed.a.b=1", "deepspeed.a.b: the checkpoint has None, this run 1"),
    ):
        with pytest.raises(CheckpointError, match="was written by another run") as refused:
            check_fit(state, expected_identity(state, saved_config(older, [fixed])), older / LAST)
        assert words in str(refused.value)
        assert "or all the same with --force" in str(refused.value)


def test_a_removed_setting_is_refused_where_it_was_used(
    older: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped_run("zero2", tmp_path)
    expected = expected_identity(read_state(older / LAST), saved_config(older))
    edit_settings(run, lambda settings: settings.update({"train.former": "none", "model.fusion.former": 3}))
    with pytest.raises(CheckpointError, match=r"model\.fusion\.former: the checkpoint has 3, and this version has no such setting") as refused:  # fmt: skip
        check_fit(read_state(run / LAST), expected, run / LAST)
    assert "train.former" not in str(refused.value)
    check_fit(read_state(run / LAST), expected, run / LAST, force=True)
    assert "--force: step-00000006 is continued although this run differs" in caplog.text
    with pytest.raises(ConfigError, match=r"model\.fusion\.former=3; use the version that wrote it \(0\.1\.0\)"):
        saved_config(run)
    edit_settings(run, lambda settings: settings.update({"model.fusion.former": 0}))
    caplog.set_level(logging.INFO)
    check_fit(read_state(run / LAST), expected, run / LAST)
    assert "not used, and not in this version of egmf-trainer: model.fusion.former, train.former" in caplog.text
    assert saved_config(run) == saved_config(older)


@pytest.mark.parametrize("found", [2, 0, None, "1"])
def test_another_format_is_refused_with_what_to_do(found: object, tmp_path: Path) -> None:
    run = stopped_run("zero2", tmp_path)
    edit_state(run / LAST, lambda state: state.update({"format": found, "version": "0.9.0"}))
    with pytest.raises(CheckpointError, match=r"use version 0\.9\.0, or start anew") as refused:
        read_state(run / LAST)
    assert f"has checkpoint format {found!r}, and this version of egmf-trainer" in str(refused.value)


def test_a_state_without_what_is_needed_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = stopped_run("zero2", tmp_path)
    edit_state(run / LAST, lambda state: state["selection"].pop("nll"))
    with pytest.raises(CheckpointError, match=r"selection\.nll.*use the version that wrote it, or start anew"):
        read_state(run / LAST)
