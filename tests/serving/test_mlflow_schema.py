"""The signature of MLflow models and the table of their answers; pinned requirements."""

from __future__ import annotations

import importlib.metadata

import pandas as pd
import pytest
from mlflow.models.utils import _enforce_schema
from packaging.requirements import Requirement

from trainer.data.task_input import TaskInput
from trainer.serving.mlflow_model.requirements import TRAINING, own_code, pinned
from trainer.serving.mlflow_model.schema import COLUMNS, OUTPUT, answer_table, input_example, numbers_alone, signature
from trainer.tasks import get_task

LABELS, NUMBERS, BOTH = (
    {name: get_task(name) for name in names} for names in (["meld"], ["simsv2"], ["meld", "mosei"])
)


def test_predictions_are_numbers_where_all_tasks_are() -> None:
    for tasks, numbers in ((LABELS, False), (NUMBERS, True), (BOTH, False)):
        assert numbers_alone(tasks) == numbers
        outputs = signature(tasks).outputs.input_dict()
        assert list(outputs) == list(OUTPUT)
        assert outputs["prediction"].type.name == ("double" if numbers else "string")


def test_a_table_of_answers() -> None:
    rows = [
        {"id": "a", "task": "simsv2", "prediction": 0.25, "valid": True, "answer": "0.2", "probabilities": {"0.2": 1.0}, "gate_expert": None},
        {"id": "b", "task": "", "valid": False, "fault": "why"},
    ]  # fmt: skip
    table = answer_table(rows, numbers=True)
    assert list(table.columns) == list(OUTPUT)
    assert table["prediction"].dtype == "float64"
    assert table["prediction"][0] == 0.25
    assert pd.isna(table["prediction"][1])
    assert table["valid"].tolist() == [True, False]
    assert table["probabilities"].tolist() == [{"0.2": 1.0}, {}]
    assert table["fault"].tolist() == [None, "why"]
    text = answer_table(rows, numbers=False)
    assert text["prediction"].tolist() == ["0.25", None]
    assert answer_table([], numbers=True).empty


def test_columns_take_what_own_data_take() -> None:
    """MLflow lets pass what JSON, pandas and Spark make of the keys: ids that are numbers, numbers with gaps, arrays or paths."""
    given = pd.DataFrame(
        [
            {"id": 7, "text": "a", "turn": 3, "audio": [[0.5, 1.0]], "rate": {"audio": 12.5}, "start": 1},
            {"id": 8, "text": None, "turn": None, "audio": "a.npy", "rate": None, "start": 2},
        ]
    )
    taken = _enforce_schema(given, signature(LABELS).inputs)
    assert set(taken.columns) == set(given.columns)
    assert taken["audio"].tolist() == [[[0.5, 1.0]], "a.npy"]
    assert taken["id"].tolist() == [7, 8]
    assert set(given.columns) <= set(COLUMNS)


def test_the_example_has_the_model_s_widths_and_nobody_s_data() -> None:
    inputs = {
        "cherma": TaskInput(get_task("cherma"), {"audio": 4, "video": 0}, {}),
        "mosei": TaskInput(get_task("mosei"), {"audio": 2, "video": 3}, {}),
    }
    table = input_example(inputs)
    assert table["task"].tolist() == ["cherma", "mosei"]
    assert [len(frames[0]) for frames in table["audio"]] == [4, 2]
    assert pd.isna(table["video"][0])
    assert len(table["video"][1][0]) == 3
    assert table["text"][0] != table["text"][1]


def test_requirements_are_what_is_installed() -> None:
    lines = [Requirement(line) for line in pinned()]
    for one in lines:
        installed = importlib.metadata.version(one.name)
        assert one.specifier.contains(installed.partition("+")[0])
        assert str(one.specifier).startswith("==")
    names = {one.name for one in lines}
    assert {"torch", "transformers", "peft", "mlflow", "pydantic"} <= names
    assert not names & TRAINING
    assert "av" in {Requirement(line).name for line in pinned(clips=True)} - names


def test_its_own_code_travels_or_is_a_requirement() -> None:
    folders, lines = own_code(None)
    assert [folder.rpartition("/")[2] for folder in folders] == ["trainer"]
    assert lines == []
    assert own_code("egmf-trainer==0.2") == ([], ["egmf-trainer==0.2"])
    with pytest.raises(ValueError, match="is not a requirement of pip"):
        own_code("egmf trainer 0.2")
