"""Which settings make a run what it is: marked at the schema's fields, once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainer.checkpoint.identity import completed_settings, effect_of, identify, training_settings
from trainer.checkpoint.state import CheckpointState, LossMonitorState, Position, SelectionState, check_fit, read_state
from trainer.config import RunConfig, check_config, flatten

# version 0.1.0's own list of what could change when a run was continued
FREE = {
    "data.path", "data.layout", "data.workers", "model.backbone.attention", "model.fusion.compile", "model.backbone.read",
    "model.backbone.gradient_checkpointing", "model.backbone.reentrant", "model.fusion.gate.kernel", "train.micro_batch",
    "train.micro_tokens", "train.log_every", "train.eval_every", "train.save_every", "train.keep", "train.resume",
    "train.stop_signals", "train.probe", "train.rendezvous_seconds", "train.max_skipped", "train.spike", "train.stuck_seconds",
}  # fmt: skip


def test_what_could_change_in_a_continued_run_still_can() -> None:
    config = check_config({"task": "meld", "data": {"weights": {"meld": 1.0}}, "deepspeed": {"a": {"b": 1}}})
    trained = set(training_settings(config))
    assert not trained & FREE
    assert not {key for key in trained if key.startswith(("eval.", "track."))}
    must_agree = {
        "task",
        "data.weights.meld",
        "deepspeed.a.b",
        "data.history",
        "model.adapter.rank",
        "train.seed",
        "train.zero",
    }
    assert must_agree <= trained
    assert {effect_of(key) for key in flatten(config)} == {"training", "selection", "execution", "scoring", "record"}
    assert effect_of("no.such.key") == "training"


def test_settings_of_dictionaries_come_back_from_their_flat_form() -> None:
    config = check_config(
        {
            "task": ["meld", "simsv2"],
            "data": {"weights": {"meld": 2.0}},
            "deepspeed": {"zero_optimization": {"stage": 2}},
        }
    )
    saved: dict[str, Any] = training_settings(config)
    assert completed_settings(saved) == (saved, {})
    assert completed_settings({"task": "meld", "old.key": 1})[1] == {"old.key": 1}


def test_an_infinite_setting_is_saved_and_agrees_again(tmp_path: Path) -> None:
    config: RunConfig = check_config({"task": ["meld", "simsv2"], "data": {"mixing_temperature": math.inf}})
    identity = identify(config, data={"meld": "a"}, base="b", world_size=1)
    state = CheckpointState(
        **identity.model_dump(), step=1, selection=SelectionState(best=None, validations={}, nll={}),
        health=LossMonitorState(), position=Position(),
    )  # fmt: skip
    (tmp_path / "state.json").write_text(json.dumps(state.model_dump(mode="json"), allow_nan=False))
    check_fit(read_state(tmp_path), identity, tmp_path)


def test_how_numbers_are_scored_is_trained_where_the_loss_has_their_expected_error() -> None:
    plain, error = ({"task": "mosei", "train": {"regression_loss": weight}} for weight in (0.0, 0.5))
    assert "eval.score" not in training_settings(check_config(plain))
    saved = training_settings(check_config(error))
    assert saved["eval.score"] == "constrained"
    assert completed_settings(saved) == (saved, {})
    older = {
        key: value for key, value in saved.items() if key != "eval.score"
    }  # of a version that knew full scores alone
    assert completed_settings(older)[0] == saved | {"eval.score": "full"}
