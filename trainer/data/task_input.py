"""What a trained model must know of the data of its tasks, without the data: widths, rates, how frames were prepared, by what recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.data.dataset import PreparedDataset
from trainer.data.preparation.frames import ZeroFrames
from trainer.features.recipe_record import RecipeRecord
from trainer.tasks import Task


@dataclass(frozen=True)
class TaskInput:
    """What a model reads of one of its tasks: `widths` (features a frame, 0: none) and `rates` (frames a second, None:
    unknown) are those of the data it was trained with, and `zero_frames` is how these were prepared. `dataset` is the name of
    that data, where the model answers several questions about the same samples. `max_rate`: the data were resampled to it from
    streams of `source_rates`, which samples are taken to have where they say nothing. `recipe`: by what the features were extracted."""

    task: Task
    widths: Mapping[str, int]
    rates: Mapping[str, float | None]
    zero_frames: ZeroFrames = "mask"
    dataset: str | None = None
    max_rate: float | None = None
    source_rates: Mapping[str, float | None] = field(default_factory=dict)
    recipe: RecipeRecord | None = None


def task_inputs(tasks: Mapping[str, Task], data: Mapping[str, PreparedDataset]) -> dict[str, TaskInput]:
    """Task -> what a model that is trained with these datasets reads of it."""
    together = shared_encoders(data)
    return {
        name: TaskInput(
            task,
            data[name].widths,
            data[name].rates,
            data[name].zero_frames,
            together.get(name),
            data[name].max_rate,
            data[name].source_rates,
            data[name].record.get("recipe"),
        )
        for name, task in tasks.items()
    }


def shared_encoders(data: Mapping[str, PreparedDataset]) -> dict[str, str]:
    """Task -> the name of its encoders, of tasks that ask about the samples of one dataset: that of the dataset."""
    places = [opened.path for opened in data.values()]
    return {name: opened.name for name, opened in data.items() if places.count(opened.path) > 1}
