"""The Arrow columns of a prepared dataset.

One question's answers stand in `label`, `target` and, of labels, `shares`; those of several in columns of their own, such as
`label_valence`, null where a sample does not answer.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from trainer.data.readers.raw import ALL
from trainer.questions import Definition, Questions
from trainer.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

STREAMS = ("audio", "video")


def answer_column(column: str, question: str) -> str:
    """The name of `label`, `target` or `shares` of one of several questions."""
    return f"{column}_{question}"


def features(definition: Definition, splits: Container[str]) -> Any:
    """The columns as `datasets.Features`."""
    from datasets import Features, List, Value  # slow to import, and worker processes need it not

    def shares(task: Task) -> dict[str, Any]:
        return {"shares": List(Value("float32"))} if task.kind == "classification" else {}

    columns: dict[str, Any] = {"id": Value("string"), "text": Value("string")}
    if not isinstance(definition, Questions):
        columns |= {"label": Value("string"), "target": Value("float64")}
    for name in STREAMS:
        columns[name] = List(Value("float32"))
        columns[f"{name}_frames"] = Value("int32")
        columns[f"{name}_mask"] = List(Value("bool"))
    columns |= {"speaker": Value("string"), "dialogue": Value("string"), "turn": Value("int64")}
    columns |= {"kind": Value("string"), "language": Value("string")}
    if ALL in splits:
        columns["fold"] = Value("string")
    if not isinstance(definition, Questions):
        return Features(columns | shares(definition))
    for task in definition.questions:
        own = {"label": Value("string"), "target": Value("float64"), **shares(task)}
        columns |= {answer_column(name, task.name): kind for name, kind in own.items()}
    return Features(columns)


def schema(definition: Definition, splits: Container[str]) -> pa.Schema:
    """The columns as an Arrow schema."""
    return features(definition, splits).arrow_schema
