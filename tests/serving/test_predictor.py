"""A predictor answers as the evaluation and `egmf predict` do, bit by bit, whatever its samples are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.serving.conftest import TASKS
from trainer import Predictor
from trainer.data.dataset import open_dataset
from trainer.results.predict import Options, predict
from trainer.run.saved import SavedRun
from trainer.serving.prediction import Prediction


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.load(run)


def own_samples(run: Path, name: str) -> list[dict[str, Any]]:
    """A prepared test split as dictionaries."""
    samples = []
    for sample in open_dataset(run.parent / name)["test"]:
        one: dict[str, Any] = {"id": sample.id, "text": sample.text, "task": name, "speaker": sample.speaker}
        one |= {"dialogue": sample.dialogue, "turn": sample.turn}
        one |= {key: value for key in ("audio", "video") if (value := getattr(sample, f"{key}_TF")) is not None}
        samples.append(one)
    return samples


@pytest.fixture(scope="module")
def samples(run: Path) -> list[dict[str, Any]]:
    return [sample for name in TASKS for sample in own_samples(run, name)]


def test_equal_to_the_evaluation_bit_by_bit(run: Path, predictor: Predictor, samples: list[dict[str, Any]]) -> None:
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    expected = {(row.task, row.id): row for row in table.itertuples()}
    found = predictor.predict(samples)
    assert [(one.task, one.id) for one in found] == [(sample["task"], sample["id"]) for sample in samples]
    for one in found:
        row = expected[one.task, one.id]
        prediction = one.prediction if isinstance(one.prediction, str) else repr(one.prediction)
        assert (prediction, one.valid, one.answer) == (row.prediction, row.valid, row.answer)
        assert one.probabilities is not None
        assert one.gate_expert is not None
        assert one.gate_modality is not None
        assert list(one.probabilities.values()) == list(row.probabilities)
        assert list(one.gate_expert.values()) == list(row.gate_expert)
        assert [list(of.values()) for of in one.gate_modality.values()] == [list(w) for w in row.gate_modality]


def test_equal_to_the_command(predictor: Predictor, opened: SavedRun, samples: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = []
    for n, sample in enumerate(samples):
        line = dict(sample)
        for key in ("audio", "video"):
            if key in line:
                np.save(tmp_path / f"{n}-{key}.npy", line[key])
                line[key] = f"{n}-{key}.npy"
        lines.append(json.dumps(line))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    predict(opened, [tmp_path / "in.jsonl"], out, Options(probabilities=True, gates=True), report=print)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one.plain() for one in predictor.predict(samples)] == written
    assert [one.plain() for one in predictor.stream(iter(samples)) if isinstance(one, Prediction)] == written
