"""What the MLflow model takes and gives, as MLflow's signature says it; and predictions as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from trainer.data.task_input import TaskInput

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from trainer.tasks import Task

TEXTS = ("text", "task", "clip", "language")  # columns of text
OTHERS = ("id", "audio", "video", "audio_length", "video_length", "rate", "speaker", "dialogue", "turn", "start", "end")
COLUMNS = (
    "id",
    "text",
    "task",
    "audio",
    "video",
    *(c for c in (*TEXTS, *OTHERS) if c not in {"id", "text", "task", "audio", "video"}),
)
FILES = ("audio", "video", "clip")  # columns that may name a file
OUTPUT = ("id", "task", "prediction", "valid", "answer", "probabilities", "fault")
TASK, FAULTY = "task", "faulty"  # parameters of a call
REFUSE, REPORT = "refuse", "report"  # values of `faulty`
EXAMPLE_FRAMES, EXAMPLE_ROWS = 2, 3
EXAMPLE_TEXTS = {"en": "I did not expect that at all.", "zh": "这个我完全没有想到。"}


def signature(tasks: Mapping[str, Task]) -> ModelSignature:
    """The columns, the parameters and the columns of the answer.

    All columns of the input are optional for MLflow, since samples may lack any modality; what a sample must have is checked where it
    is read. Those that hold arrays or a path, or numbers with gaps, have MLflow's type `any`: it has no other for either-or, and turns
    no integer into a float. `prediction` is a double where all tasks are numbers, else text (numbers as Python writes them).
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Map

    either = AnyType()  # type: ignore[no-untyped-call]
    inputs = [ColSpec(DataType.string if name in TEXTS else either, name, required=False) for name in COLUMNS]
    prediction = DataType.double if numbers_alone(tasks) else DataType.string
    outputs = [
        ColSpec(DataType.string, "id"),
        ColSpec(DataType.string, "task"),
        ColSpec(prediction, "prediction", required=False),
        ColSpec(DataType.boolean, "valid"),
        ColSpec(DataType.string, "answer", required=False),
        ColSpec(Map(DataType.double), "probabilities"),
        ColSpec(DataType.string, "fault", required=False),
    ]
    parameters = [ParamSpec(TASK, DataType.string, ""), ParamSpec(FAULTY, DataType.string, REFUSE)]
    return ModelSignature(inputs=Schema([*inputs]), outputs=Schema([*outputs]), params=ParamSchema(parameters))


def numbers_alone(tasks: Mapping[str, Task]) -> bool:
    """Whether every prediction is a number."""
    return all(task.kind == "regression" for task in tasks.values())


def input_example(inputs: Mapping[str, TaskInput]) -> pd.DataFrame:
    """Made-up samples, one for each of the first tasks, with features of the model's widths: nobody's data get into a registry."""
    rows = []
    for i, (name, one) in enumerate(list(inputs.items())[:EXAMPLE_ROWS]):
        row: dict[str, Any] = {"id": f"example-{i + 1}", "text": EXAMPLE_TEXTS[one.task.language], "task": name}
        for stream, width in one.widths.items():
            if width:
                row[stream] = [[round(0.1 * (frame + 1), 1)] * width for frame in range(EXAMPLE_FRAMES)]
        rows.append(row)
    return pd.DataFrame(rows)


def answer_table(rows: Iterable[Mapping[str, Any]], *, numbers: bool) -> pd.DataFrame:
    """Predictions as a table with the columns of the signature.

    Args:
        rows: the keys of :data:`OUTPUT`; what is absent is null, and of probabilities an empty mapping.
        numbers: whether `prediction` is a column of numbers.
    """
    found = list(rows)
    columns: dict[str, Any] = {}
    for name in OUTPUT:
        values = [row.get(name) for row in found]
        if name == "valid":
            columns[name] = np.array([bool(value) for value in values], dtype=bool)
        elif name == "prediction" and numbers:
            columns[name] = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        elif name == "probabilities":
            columns[name] = pd.Series([value or {} for value in values], dtype=object)
        else:
            columns[name] = pd.Series([None if value is None else str(value) for value in values], dtype=object)
    return pd.DataFrame(columns)
