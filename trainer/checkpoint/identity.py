"""The identity of a run: a checkpoint and the run that continues it must agree on it.

Which settings may differ is marked at each field of the schema (:mod:`trainer.config`, :data:`trainer.schema.Effect`), and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer

from trainer.config import RunConfig, flatten
from trainer.distributed.deepspeed_config import zero_stage
from trainer.saved_config import unsaid
from trainer.schema import Effect, find


class RunIdentity(BaseModel):
    """Tasks, data (task -> fingerprint), frozen base (its hash), world size, ZeRO stage and settings of a run."""

    model_config = ConfigDict(frozen=True)

    tasks: list[str]
    data: dict[str, str]
    base: str
    world: int
    zero: int
    settings: dict[str, Any]  # dotted key -> value of what affects the training

    @field_serializer("settings")
    def _as_json_holds_them(self, settings: dict[str, Any]) -> dict[str, Any]:
        """JSON has no infinity: it is written as text, which the schema reads back as a number."""
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in settings.items()}


def identify(config: RunConfig, *, data: dict[str, str], base: str, world_size: int) -> RunIdentity:
    """The identity of a run.

    Args:
        data: task -> fingerprint of its prepared dataset.
        base: fingerprint of the frozen backbone.
    """
    return RunIdentity(
        tasks=list(data),
        data=data,
        base=base,
        world=world_size,
        zero=zero_stage(config),
        settings=training_settings(config),
    )


def effect_of(key: str) -> Effect:
    """What a change of a dotted key affects; a key that this version does not have counts as training."""
    place = find(RunConfig, key)
    return "training" if place is None else place.affects


def training_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is trained: dotted key -> value."""
    return _that_train(flatten(config))


def _that_train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of all settings; how numbers are scored decides it where the loss has their expected error."""
    also = {"eval.score"} if settings.get("train.regression_loss") else set()
    return {key: value for key, value in settings.items() if key in also or effect_of(key) == "training"}


def completed_settings(saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`training_settings` that another version may have saved, as this version has them, and those it does not have.

    A key that was not known then has the value of :func:`trainer.saved_config.unsaid`; saved values are not checked.
    """
    known = {key: value for key, value in saved.items() if find(RunConfig, key) is not None}
    unknown = {key: value for key, value in saved.items() if key not in known}
    return _that_train(known | unsaid(known)), unknown
