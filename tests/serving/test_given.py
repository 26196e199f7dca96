"""Samples as Python objects are read and refused as `egmf predict` reads and refuses lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.toy import WIDTHS
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.clips import ClipExtraction
from trainer.data.unlabelled.inputs import open_input
from trainer.data.unlabelled.reader import CheckedSample, UnlabelledReader
from trainer.serving.given import GivenSamples, chunks_of_given, samples_in
from trainer.tasks import get_task

RATES = {"audio": 10.0, "video": None}
INPUTS = {name: TaskInput(get_task(name), WIDTHS, RATES) for name in ("meld", "simsv2")}
AUDIO = np.random.default_rng(0).normal(size=(7, WIDTHS["audio"])).astype("f4")


def read(values: Any, **options: Any) -> list[CheckedSample]:
    extraction = ClipExtraction(lambda task: None)
    given = GivenSamples(list(samples_in(values)), extraction, **options)
    with UnlabelledReader(given, INPUTS, task=options.get("task")) as reader:
        return list(reader)


def read_lines(values: Sequence[dict[str, Any]], folder: Path) -> list[CheckedSample]:
    """The same by JSON lines and files."""
    lines = []
    for n, sample in enumerate(values):
        line = dict(sample)
        for key in ("audio", "video"):
            if isinstance(line.get(key), np.ndarray):
                np.save(folder / f"{n}-{key}.npy", line[key])
                line[key] = f"{n}-{key}.npy"
        lines.append(json.dumps(line))
    (folder / "in.jsonl").write_text("\n".join(lines))
    with UnlabelledReader(open_input([folder / "in.jsonl"], INPUTS), INPUTS) as reader:
        return list(reader)


SAME: list[dict[str, Any]] = [
    {"id": "good", "text": " Hi. ", "task": "meld", "audio": AUDIO, "label": "no such label"},
    {"id": "content", "task": "meld"},
    {"id": "task", "text": "a"},
    {"id": "another", "text": "a", "task": "mosei"},
    {"id": "width", "text": "a", "task": "meld", "audio": np.ones((5, 9))},
    {"id": "shape", "text": "a", "task": "meld", "video": np.ones((5, 2, 1))},
    {"id": "length", "text": "a", "task": "meld", "audio": AUDIO, "audio_length": 8},
    {"id": "misspelt", "text": "a", "task": "meld", "vidoe": "x"},
    {"id": "nan", "text": "a", "task": "meld", "audio": np.where(np.arange(7)[:, None] == 2, np.nan, AUDIO)},
    {"id": "inf", "text": "a", "task": "meld", "video": np.full((3, WIDTHS["video"]), np.inf)},
    {"id": "zeros", "text": "a", "task": "meld", "audio": np.zeros((3, WIDTHS["audio"]))},
    {"id": "vector", "text": "a", "task": "meld", "audio": AUDIO[0]},
    {"id": "words", "text": "a", "task": "meld", "audio": np.array([["a"]])},
    {"id": "rate", "text": "a", "task": "meld", "rate": {"audio": 50}},
    {"id": "unknown", "text": "a", "task": "meld", "colour": "red"},
    {"id": "number", "text": 3, "task": "meld"},
    {"id": "a length that is text", "text": "a", "task": "meld", "audio_length": "5"},
    {"id": "a turn that is none", "text": "a", "task": "meld", "turn": 1.5},
    {"id": "audio that is a number", "text": "a", "task": "meld", "audio": 5},
    {"id": "rates", "text": "a", "task": "meld", "rate": {"sound": 5, "audio": -1}},
    {"id": "no file", "text": "a", "task": "meld", "audio": "/none/none.npy"},
    {"id": "no clip", "task": "meld", "clip": "/none/none.mp4"},
    {"id": "clip and audio", "task": "meld", "clip": "/none/none.mp4", "audio": AUDIO},
    {"id": 7, "text": "a", "task": "simsv2"},
]


def test_checks_and_messages_are_those_of_the_command(tmp_path: Path) -> None:
    found, expected = read(SAME), read_lines(SAME, tmp_path)
    for given, a, b in zip(SAME, found, expected, strict=True):
        assert (a.faults, a.notes, a.tasks) == (b.faults, b.notes, b.tasks), given["id"]
        assert (a.sample is None) == (b.sample is None) == bool(a.faults)
        if a.sample is None or b.sample is None:
            continue
        assert (a.sample.id, a.sample.text) == (b.sample.id, b.sample.text)
        for name in ("audio_TF", "video_TF", "audio_mask_T", "video_mask_T"):
            np.testing.assert_array_equal(getattr(a.sample, name), getattr(b.sample, name))
    assert sum(bool(one.faults) for one in found) == 16
    assert [one.where for one in found[:2]] == ["samples[0]", "samples[1]"]


def test_arrays_in_every_form_are_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", AUDIO)
    forms = [AUDIO, AUDIO.tolist(), tuple(map(tuple, AUDIO)), torch.from_numpy(AUDIO), tmp_path / "a.npy"]
    forms += [str(tmp_path / "a.npy"), np.array([*AUDIO, None], dtype=object)[:-1], AUDIO.astype("f8")]
    for found in read([{"text": "a", "task": "meld", "audio": form} for form in forms]):
        assert found.sample is not None, found.faults
        np.testing.assert_array_equal(found.sample.audio_TF, AUDIO)
        assert not np.shares_memory(found.sample.audio_TF, AUDIO)  # which its owner may change


@dataclass
class Utterance:
    text: str
    audio: np.ndarray | None = None
    video: np.ndarray | None = None
    turn: int | None = None
    dialogue: str | None = None


def test_dataclasses_and_tables_are_dictionaries() -> None:
    values = [{"text": "a", "audio": AUDIO, "turn": 3, "dialogue": "d"}, {"text": "b"}]
    expected = read(values, task="meld")
    table = pd.DataFrame([{**value, "id": None, "video": float("nan"), "start": pd.NA} for value in values])
    assert table["turn"].dtype == float  # 3.0 and nan
    for given in (
        [Utterance(**value) for value in values],
        table,
        [row for _, row in table.iterrows()],
        (value for value in values),
    ):
        found = read(given, task="meld")
        assert [one.notes for one in found] == [[], []]
        for a, b in zip(found, expected, strict=True):
            assert a.sample is not None, a.faults
            assert b.sample is not None
            assert (a.sample.id, a.sample.text) == (b.sample.id, b.sample.text)
            np.testing.assert_array_equal(a.sample.audio_TF, b.sample.audio_TF)
    assert [one.sample.id for one in expected if one.sample] == ["sample-00001", "sample-00002"]


def test_a_table_as_parquet_gives_it_back(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a"], "audio": [AUDIO.tolist()]}).to_parquet(tmp_path / "t.parquet")
    (found,) = read(pd.read_parquet(tmp_path / "t.parquet"), task="meld")
    assert found.sample is not None, found.faults
    np.testing.assert_array_equal(found.sample.audio_TF, AUDIO)


def test_what_is_no_sample_is_told(tmp_path: Path) -> None:
    given = [3, None, {1: "a"}, ["a"], {"text": "a"}, str(tmp_path / "none.mp4"), tmp_path / "none.mp4", Utterance]
    found = read(given, task="meld", first=10)
    kind = "a sample is a dictionary, a dataclass, or the path of a clip"
    missing = f"clip {tmp_path}/none.mp4 does not exist"
    assert [one.faults for one in found] == [
        [f"is of type int: {kind}"],
        [f"is of type NoneType: {kind}"],
        ["has the key '1', which is no text"],
        [f"is of type list: {kind}"],
        [],
        [missing],
        [missing],
        [f"is of type type: {kind}"],
    ]
    assert (found[4].where, found[4].sample and found[4].sample.id) == ("samples[14]", "sample-00015")
    assert found[5].id == "none-00016"
    with pytest.raises(ValueError, match=r"column\(s\) text twice"):
        read(pd.DataFrame([["a", "b"]], columns=["text", "text"]))


class Broken:
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("not today")


def test_tensors_are_arrays_and_what_makes_none_costs_its_sample_alone() -> None:
    whole = np.arange(7 * WIDTHS["audio"], dtype="f4").reshape(7, -1)
    tensor = torch.tensor(whole)
    given = [tensor, tensor.clone().requires_grad_(), tensor.bfloat16(), Broken(), torch.tensor(whole > 3).to_sparse()]
    found = read([{"text": "a", "audio": audio} for audio in given], task="meld")
    for one in found[:3]:
        assert one.sample is not None, one.faults
        np.testing.assert_array_equal(one.sample.audio_TF, whole)
    for one in found[3:]:
        assert one.faults == ["audio that is no array of numbers (dtype object)"]


def test_chunks_are_bounded_in_number_and_bytes() -> None:
    heavy = {"audio": np.zeros(100, "u1")}
    given = [heavy, heavy, heavy, {}, {}, {}, {}]
    assert [len(chunk) for chunk in chunks_of_given(iter(given), 3, 200)] == [2, 3, 2]


def test_one_row_of_a_table_is_not_several_samples() -> None:
    table = pd.DataFrame({"id": ["a", "b"], "text": ["No!", "Yes."]})
    with pytest.raises(ValueError, match="one row of a table was given where several are expected"):
        list(samples_in(table.iloc[0]))
    assert list(samples_in(pd.Series(["a.mp4", "b.mp4"], index=["first", "second"]))) == ["a.mp4", "b.mp4"]
