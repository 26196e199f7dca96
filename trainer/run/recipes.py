"""The recipes by which a run's data were extracted: every dataset that it reads must have the one that it was trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from trainer.data.dataset import PreparedDataset
from trainer.features.recipe_record import RecipeRecord, described, differences_of, name_of
from trainer.run.record import read_record

log = logging.getLogger(__name__)


class RecipeError(ValueError):
    """Features of another recipe than the run was trained with; the message has the differences."""


def recipes_of(data: Mapping[str, PreparedDataset]) -> dict[str, RecipeRecord]:
    """Task -> the recipe of its dataset, of those tasks where it is known."""
    return {name: opened.record["recipe"] for name, opened in data.items() if "recipe" in opened.record}


def saved_recipes(run: Path) -> dict[str, RecipeRecord]:
    """The same, as the run's record has it."""
    record = read_record(run)
    return {} if record is None else dict(record.get("recipe", {}))


def check_recipes(
    trained: Mapping[str, RecipeRecord], data: Mapping[str, PreparedDataset], run: str, *, warn: bool = True
) -> None:
    """Refuse datasets that another recipe extracted than the run was trained with; warn of those whose recipe is not known.

    Args:
        trained: task -> recipe of a run's record.
        run: what messages call the run.
        warn: false on all ranks but one.

    Raises:
        RecipeError: every such dataset, with the differences.
    """
    here = recipes_of(data)
    faults = []
    for task, saved in trained.items():
        if task not in data:
            continue
        found = here.get(task)
        if found is None:
            if warn:
                log.warning(
                    "task %s: %s was trained with %s, and nothing says by what the features of %s were extracted",
                    task, run, name_of(saved), data[task].path,
                )  # fmt: skip
        elif lines := differences_of(saved, found):
            faults.append(
                described(f"{data[task].path} was extracted by another recipe than {run} was trained with", lines)
            )
    if faults:
        raise RecipeError("\n".join([*faults, "extract the clips again by the run's recipe, or train a new run"]))
