"""What a model answers and reads, in plain values; nothing of the machine it lies on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainer import __version__
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.inputs import askable, usual
from trainer.features.recipe_record import RecipeRecord, kinds_of, shipped_name
from trainer.serving.http.limits import Limits
from trainer.serving.predictor import Predictor


def describe_tasks(predictor: Predictor, limits: Limits, no_clips: str | None) -> dict[str, Any]:
    """The tasks with their labels or numbers, what the model reads for each, and the server's limits.

    Args:
        no_clips: why clips are not taken; None where they are.
    """
    inputs, config = predictor.inputs, predictor.opened.config
    together = {name: list(asked) for name, asked in askable(inputs).items() if name not in inputs}
    return {
        "tasks": {name: _task(one) for name, one in inputs.items()},
        "questions": together,
        "default": usual(inputs),
        "history": config.data.history,
        "gates": predictor.opened.parts.model.fusion is not None and config.eval.mode == "score",
        "probabilities": config.eval.mode == "score",
        "clips": {"taken": no_clips is None, "why_not": no_clips},
        "limits": asdict(limits),
        "version": __version__,
    }


def _task(one: TaskInput) -> dict[str, Any]:
    task, grid = one.task, one.task.grid
    return {
        "kind": task.kind,
        "language": task.language,
        "labels": None if grid is not None else list(task.labels),
        "grid": None if grid is None else {"low": grid.low, "high": grid.high, "step": grid.step},
        "instruction": task.instruction(),
        "inputs": {
            name: None if not one.widths.get(name) else {"width": one.widths[name], "rate": one.rates.get(name)}
            for name in ("audio", "video")
        },
        "recipe": None if one.recipe is None else _recipe(one.recipe),
    }


def _recipe(record: RecipeRecord) -> dict[str, Any]:
    return {"hash": record["hash"], "name": shipped_name(record), "kinds": kinds_of(record)}


def one_recipe(inputs: Mapping[str, TaskInput]) -> tuple[RecipeRecord | None, str | None]:
    """The recipe by which the data of all tasks were extracted; or why there is none."""
    found = {one.recipe["hash"]: one.recipe for one in inputs.values() if one.recipe is not None}
    if len(found) == 1 and all(one.recipe is not None for one in inputs.values()):
        return next(iter(found.values())), None
    if found:
        return None, "the model's tasks come from several recipes"
    return None, "the model's data come from no recipe"
