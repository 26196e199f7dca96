"""Predictions of samples without labels: equal to the evaluation's in every format, and bad samples cost only themselves."""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.distributed.processes import egmf, environment, run_ranks
from tests.toy import WIDTHS, prepare_toy
from trainer.batch import Sample
from trainer.data.dataset import open_dataset
from trainer.data.preparation.prepare import prepare_source
from trainer.data.readers.raw import ReaderError
from trainer.data.readers.source import open_source
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.inputs import LONGEST, PredictError, check_places, open_input
from trainer.data.unlabelled.reader import CheckedSample, UnlabelledReader
from trainer.distributed.world import World
from trainer.results import answering as module
from trainer.results.predict import Options, Tally, predict
from trainer.run.saved import SavedRun, open_run
from trainer.tasks import get_task

ROOT = Path(__file__).parent.parent.parent
TASKS = ("meld", "simsv2")
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, of both kinds, with histories."""
    folder = tmp_path_factory.mktemp("predict")
    for name in TASKS:
        prepare_toy(name, folder)
    small = ("train.steps=3", "model.backbone.tiny.vocab_size=400", "train.global_batch=8", "train.micro_batch=4")
    more = (
        "data.history=2",
        "eval.batch=4",
        "track.mlflow=false",
        "track.report=false",
        "task=[meld,simsv2]",
        f"data.path={folder}/{{task}}",
    )
    done = egmf("train", f"{ROOT}/configs/tiny.yaml", *small, *more, "--out", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def opened(run: Path) -> SavedRun:
    return open_run(run, WORLD)


def unlabelled(run: Path, name: str, folder: Path) -> list[dict[str, Any]]:
    """A prepared test split as own samples: lines, and `.npy` files in `folder`."""
    lines = []
    for sample in open_dataset(run.parent / name)["test"]:
        line: dict[str, Any] = {"id": sample.id, "text": sample.text, "task": name, "speaker": sample.speaker}
        line |= {"dialogue": sample.dialogue, "turn": sample.turn}
        for stream in WIDTHS:
            values = getattr(sample, f"{stream}_TF")
            if values is not None:
                line[stream] = f"{name}-{sample.id}-{stream}.npy"
                np.save(folder / line[stream], values)
        lines.append(line)
    return lines


def write(path: Path, lines: list[Any]) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def answers(
    opened: SavedRun, path: Path, out: Path, options: Options | None = None
) -> tuple[Tally, list[dict[str, Any]], list[str]]:
    output: list[str] = []
    tally = predict(opened, [path], out, options or Options(), report=output.append)
    return tally, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], output


def expected(run: Path) -> dict[tuple[str, str], Any]:
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    return {(row.task, row.id): row for row in table.itertuples()}


def as_text(value: Any) -> str:
    """As the run's table has them where its tasks are of both kinds."""
    return value if isinstance(value, str) else repr(value)


def test_equal_to_the_evaluation_bit_by_bit(run: Path, opened: SavedRun, tmp_path: Path) -> None:
    lines = [line for name in TASKS for line in unlabelled(run, name, tmp_path)]
    path = write(tmp_path / "in.jsonl", lines)
    tally, rows, output = answers(opened, path, tmp_path / "out.jsonl", Options(probabilities=True, gates=True))
    assert (tally, output) == (Tally(answered=22, bad=0), [])
    assert [(row["task"], row["id"]) for row in rows] == [(line["task"], line["id"]) for line in lines]
    table = expected(run)
    for row in rows:
        evaluated = table[row["task"], row["id"]]
        assert (as_text(row["prediction"]), row["valid"], row["answer"]) == (
            evaluated.prediction,
            evaluated.valid,
            evaluated.answer,
        )
        assert list(row["probabilities"]) == list(get_task(row["task"]).answers())
        assert list(row["probabilities"].values()) == list(evaluated.probabilities)
        assert row["gate_expert"] == dict(zip(("local", "semantic", "global"), evaluated.gate_expert, strict=True))
        for expert, weights in zip(row["gate_modality"].values(), evaluated.gate_modality, strict=True):
            assert expert == dict(zip(("text", "audio", "video"), weights, strict=True))
    assert not any("audio" in line for line in lines[:1])  # missing modalities are among them


def test_equal_within_rounding_in_another_order_and_batch(run: Path, tmp_path: Path) -> None:
    other = open_run(run, WORLD, ["eval.batch=3"])
    lines = [line for name in TASKS for line in unlabelled(run, name, tmp_path)][::-1]
    _, rows, _ = answers(
        other, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", Options(probabilities=True)
    )
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    table = expected(run)
    for row in rows:
        evaluated = table[row["task"], row["id"]]
        np.testing.assert_allclose(list(row["probabilities"].values()), evaluated.probabilities, atol=1e-5)
        if row["task"] == "simsv2":
            assert row["prediction"] == pytest.approx(float(evaluated.prediction), abs=1e-5)


def test_chunks_change_nothing(run: Path, opened: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.jsonl", unlabelled(run, "simsv2", tmp_path))
    _, whole, _ = answers(opened, path, tmp_path / "whole.jsonl")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 4)
    _, cut, _ = answers(opened, path, tmp_path / "cut.jsonl")
    assert [row["id"] for row in cut] == [row["id"] for row in whole]
    assert [r["prediction"] for r in cut] == pytest.approx([r["prediction"] for r in whole], abs=1e-5)


# ── every format that preparation reads ──────────────────────────────────────────────────────────────────────────────


def as_samples(samples: Sequence[Sample], labels: bool = True) -> list[dict[str, Any]]:
    """The layout of MELD's pickles."""
    rows = []
    for s in samples:
        features: dict[str, Any] = {"text": s.text, "audio": s.audio_TF, "video": s.video_TF}
        row = {"id": s.id, "speaker": s.speaker, "dialogue": s.dialogue, "turn": s.turn, "features": features}
        rows.append(row | ({"label": get_task("meld").labels[int(s.target)]} if labels else {}))
    return rows


def as_columns(samples: Sequence[Sample], labels: bool = True) -> dict[str, Any]:
    """The layout of `unaligned_50.pkl`: padded arrays and true lengths; 0 where a modality is missing."""
    out: dict[str, Any] = {"raw_text": [s.text for s in samples], "id": [s.id for s in samples]}
    for stream, key in (("audio", "audio"), ("video", "vision")):
        arrays = [getattr(s, f"{stream}_TF") for s in samples]
        lengths = [0 if array is None else len(array) for array in arrays]
        padded = np.zeros((len(samples), max(lengths), WIDTHS[stream]), "f4")
        for row, array, length in zip(padded, arrays, lengths, strict=True):
            row[:length] = 0 if array is None else array
        out |= {key: padded, f"{key}_lengths": lengths}
    return out | ({"regression_labels": [s.target for s in samples]} if labels else {})


def as_annotations(samples: Sequence[Sample], labels: bool = True) -> str:
    """The layout of MELD's CSVs."""
    lines = io.StringIO()
    table = csv.writer(lines)
    table.writerow(["Utterance", "Speaker", "Dialogue_ID", "Utterance_ID", *(["Emotion"] if labels else [])])
    for s in samples:
        label = [get_task("meld").labels[int(s.target)]] if labels else []
        table.writerow([s.text, s.speaker, s.dialogue, s.turn, *label])
    return lines.getvalue()


def write_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, 4))


def made_of(run: Path, layout: str, folder: Path, labels: bool = True) -> list[Path]:
    """Files of one layout with the samples of a prepared dataset of the run's."""
    opened = open_dataset(run.parent / ("simsv2" if layout == "columns" else "meld"))
    content = {split: list(opened[split]) for split in opened.splits}
    features, annotations = folder / "features", folder / "annotations"
    features.mkdir(parents=True)
    annotations.mkdir()
    if layout == "columns":
        write_pickle(features / "all.pkl", {split: as_columns(samples, labels) for split, samples in content.items()})
        return [features / "all.pkl"]
    for split, samples in content.items():
        if layout != "annotations":
            write_pickle(features / f"meld_{split}.pkl", as_samples(samples, labels))
        if layout != "samples":
            (annotations / f"{split}_sent_emo.csv").write_text(as_annotations(samples, labels), encoding="utf-8")
    return {"samples": [features], "annotations": [annotations], "both": [features, annotations]}[layout]


@pytest.mark.parametrize("layout", ["samples", "columns", "both"])
def test_every_format_is_answered_as_the_evaluation_answers_it(
    layout: str, run: Path, opened: SavedRun, tmp_path: Path
) -> None:
    task = "simsv2" if layout == "columns" else "meld"
    sources = made_of(run, layout, tmp_path / "in")
    other = {"meld": "simsv2", "simsv2": "meld"}[task]
    (tmp_path / other).symlink_to(run.parent / other)
    source = open_source(get_task(task), sources)
    source.rates = open_dataset(run.parent / task).rates  # files of these layouts have no frame rates
    prepare_source(get_task(task), source, tmp_path / task)
    table, _ = open_run(run, WORLD, data=f"{tmp_path}/{{task}}").evaluate("test")
    truth = {row.id: row for row in table[table["task"] == task].itertuples()}
    bare = made_of(run, layout, tmp_path / "bare", labels=layout == "both")  # joined by text and label
    for given in (sources, bare):  # with labels and without
        output: list[str] = []
        wanted = Options(task, probabilities=True, gates=True, split="test")
        tally = predict(opened, given, tmp_path / "out.jsonl", wanted, report=output.append)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
        assert (tally, output) == (Tally(answered=11, bad=0), [])
        assert [row["id"] for row in rows] == open_dataset(tmp_path / task)["test"].ids
        for row in rows:
            evaluated = truth[row["id"]]
            assert (row["task"], row["prediction"], row["answer"]) == (task, evaluated.prediction, evaluated.answer)
            assert list(row["probabilities"].values()) == list(evaluated.probabilities)
            assert list(row["gate_expert"].values()) == list(evaluated.gate_expert)


def test_annotations_without_labels_are_answered_like_the_same_lines(
    run: Path, opened: SavedRun, tmp_path: Path
) -> None:
    (folder,) = made_of(run, "annotations", tmp_path / "in", labels=False)
    samples = open_dataset(run.parent / "meld")["test"]
    lines = [
        {"id": f"test_dia{s.dialogue}_utt{s.turn}", "text": s.text, "task": "meld", "speaker": s.speaker}
        | {"dialogue": s.dialogue, "turn": s.turn}
        for s in samples
    ]
    _, expected_rows, _ = answers(opened, write(tmp_path / "in.jsonl", lines), tmp_path / "lines.jsonl")
    for source in (folder / "test_sent_emo.csv", folder):
        _, rows, _ = answers(opened, source, tmp_path / "out.jsonl", Options("meld", split="test"))
        assert rows == expected_rows


def test_a_split_of_own_samples_is_answered_alone(run: Path, opened: SavedRun, tmp_path: Path) -> None:
    lines = [{"id": f"i{n}", "text": "a", "task": "meld", "split": ("train", "dev", "test")[n % 3]} for n in range(6)]
    folder = tmp_path / "lines"
    folder.mkdir()
    write(folder / "some.jsonl", [*lines, {"id": "none", "text": "a", "task": "meld"}])
    write(
        folder / "valid.jsonl", [{"id": "i9", "text": "a", "task": "meld"}, {"id": "i1", "text": "a", "task": "meld"}]
    )
    tally, rows, output = answers(opened, folder, tmp_path / "out.jsonl", Options(split="valid"))
    assert [row["id"] for row in rows] == ["i1", "i4", "i9"]
    assert output == [
        "some.jsonl line 7: left out: split None is none of train, valid, test, and --split asks for valid",
        "valid.jsonl line 2: left out: duplicate id ('i1' is that of some.jsonl line 2)",
    ]
    assert tally == Tally(answered=3, bad=2)


def test_what_a_format_lacks_is_reported(run: Path, opened: SavedRun, tmp_path: Path) -> None:
    (features,) = made_of(run, "samples", tmp_path / "in", labels=False)
    out = tmp_path / "out.jsonl"
    with pytest.raises(PredictError, match="name no task, and the run has meld, simsv2: give one with --task"):
        answers(opened, features, out)
    with pytest.raises(PredictError, match=r"no such split, it has train$"):
        answers(opened, features / "meld_train.pkl", out, Options("meld", split="test"))
    write_pickle(tmp_path / "bad.pkl", ["no mapping"])
    with pytest.raises(ReaderError, match=r"row 0: is a str; a mapping with features \(text, audio, video, …\) was"):
        answers(opened, tmp_path / "bad.pkl", out, Options("meld"))
    assert not out.exists()


def test_bad_samples_of_a_pickle_cost_only_themselves(opened: SavedRun, tmp_path: Path) -> None:
    """The file need not be named after a split: ids then begin with its name."""
    good = {"text": "a", "audio": np.ones((3, 6), "f4"), "label": "no such label"}
    rows = [
        good,
        good | {"audio": np.ones((3, 9))},
        {"text": "", "audio": None},
        good | {"audio": np.full((2, 6), np.nan)},
    ]
    write_pickle(tmp_path / "clips.pkl", rows)
    tally, found, output = answers(opened, tmp_path / "clips.pkl", tmp_path / "out.jsonl", Options("meld"))
    assert [row["id"] for row in found] == ["clips-00000", "clips-00003"]
    assert tally == Tally(answered=2, bad=2)
    assert output == [
        "clips.pkl row 1: left out: wrong dimension of audio (9 features per frame instead of 6)",
        "clips.pkl row 2: left out: no text, audio or video",
        "clips.pkl row 3: no finite frame in audio: counted as missing",
    ]


# ── faulty lines ─────────────────────────────────────────────────────────────────────────────────────────────────────


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{broken", "Invalid JSON"),
    "no object": ("[1]", "should be an object"),
    "no id": ({"text": "a", "task": "meld"}, "no id"),
    "no content": ({"id": "b1", "task": "meld"}, "no text, audio or video"),
    "no task": ({"id": "b2", "text": "a"}, "names no task, the run has meld, simsv2"),
    "another task": ({"id": "b3", "text": "a", "task": "mosei"}, "task 'mosei' is none of the run's: meld, simsv2"),
    "no file": ({"id": "b4", "text": "a", "task": "meld", "audio": "none.npy"}, "no audio file "),
    "a pickle": ({"id": "b5", "text": "a", "task": "meld", "audio": "objects.npy"}, "is not a readable array"),
    "width": ({"id": "b6", "text": "a", "task": "meld", "audio": "wide.npy"}, "9 features per frame instead of 6"),
    "shape": (
        {"id": "b7", "text": "a", "task": "meld", "video": "flat.npy"},
        "shape [5, 2, 1] instead of [frames, features]",
    ),
    "length": ({"id": "b8", "text": "a", "task": "meld", "audio": "good.npy", "audio_length": 8}, "claims 8 of 7"),
    "misspelt": ({"id": "b9", "text": "a", "task": "meld", "vidoe": "x"}, "(did you mean video?)"),
    "twice": ({"id": "good", "text": "a", "task": "meld"}, "duplicate id ('good' is that of line 1)"),
    "rate": (
        {"id": "b10", "text": "a", "task": "meld", "rate": {"audio": 50}},
        "another rate of audio (50 frames a second, the run's data have 10: resample)",
    ),
    "no Unicode": ('{"id": "b11", "text": "a\\ud800", "task": "meld"}', "Invalid JSON"),
    "no UTF-8": (b'{"id": "b12", "text": "\xff", "task": "meld"}', "Invalid JSON"),
    "a length that is text": ({"id": "b13", "text": "a", "task": "meld", "audio_length": "5"}, "audio_length: "),
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A good line, every kind of bad one, lines with notes, and a good one."""
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object))
    np.save(tmp_path / "wide.npy", np.ones((5, 9)))
    np.save(tmp_path / "flat.npy", np.ones((5, 2, 1)))
    np.save(tmp_path / "good.npy", np.ones((7, 6)))
    np.save(tmp_path / "nan.npy", np.where(np.arange(7)[:, None] == 2, np.nan, np.ones((7, 6))))
    lines: list[Any] = [{"id": "good", "text": "a", "task": "meld", "audio": "good.npy", "label": "no such label"}]
    lines += [line for line, _ in BAD.values()]
    lines += [
        {"id": "nan", "text": "a", "task": "meld", "audio": "nan.npy"},
        "",
        {"id": 7, "text": "a", "task": "simsv2"},
    ]
    lines += [{"id": "note", "text": "a", "task": "simsv2", "colour": "red", "split": "none", "language": "en"}]
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(raw))
    return path


def test_bad_lines_are_reported_and_cost_only_themselves(opened: SavedRun, mixed: Path, tmp_path: Path) -> None:
    tally, rows, output = answers(opened, mixed, tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["good", "nan", "7", "note"]
    assert tally == Tally(answered=4, bad=len(BAD))
    for number, (name, (_, reason)) in enumerate(BAD.items(), start=2):
        assert output[number - 2].startswith(f"line {number}: left out: "), name
        assert reason in output[number - 2], name
    assert output[len(BAD) :] == [
        f"line {len(BAD) + 2}: nan or inf in audio: frames masked",
        f"line {len(BAD) + 5}: unknown key 'colour': not used",
    ]


def test_the_command_keeps_stdout_clean_and_says_so_with_its_code(run: Path, mixed: Path, tmp_path: Path) -> None:
    done = egmf("predict", str(run), "--input", str(mixed), "--out", "-", "--batch", "2")
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == ["good", "nan", "7", "note"]
    assert all(row.keys() == {"id", "task", "prediction", "valid", "answer"} for row in rows)
    assert "line 3: left out: " in done.stderr
    assert f"answered: 4 sample(s); left out: {len(BAD)}" in done.stderr
    good = write(tmp_path / "good.jsonl", unlabelled(run, "meld", tmp_path))
    done = egmf("predict", str(run), "--input", str(good), "--out", str(tmp_path / "new" / "p.jsonl"))
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "new" / "p.jsonl").read_text().splitlines()) == 11
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.jsonl"]


@pytest.mark.distributed
def test_two_processes_give_the_answers_of_one(run: Path, opened: SavedRun, mixed: Path, tmp_path: Path) -> None:
    lines = mixed.read_bytes().splitlines()
    mixed.write_bytes(b"\n".join([lines[0], *lines[-4:]]))
    _, alone, _ = answers(opened, mixed, tmp_path / "alone.jsonl")
    run_ranks("trainer", "predict", str(run), "--input", str(mixed), "--out", str(tmp_path / "two.jsonl"))
    both = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"]) for row in both] == [(row["id"], row["answer"]) for row in alone]


def test_generated_answers_have_no_probabilities(run: Path, tmp_path: Path) -> None:
    free = open_run(run, WORLD, ["eval.mode=generate"])
    path = write(tmp_path / "in.jsonl", unlabelled(run, "simsv2", tmp_path)[:3])
    _, rows, _ = answers(free, path, tmp_path / "out.jsonl")
    assert all(row["valid"] == (row["prediction"] is not None) for row in rows)
    with pytest.raises(PredictError, match=r"(?s)none of the run's tasks: meld, simsv2.*--probabilities.*--gates"):
        answers(free, path, tmp_path / "no.jsonl", Options("mosei", probabilities=True, gates=True))
    assert not (tmp_path / "no.jsonl").exists()


def test_places_are_checked_first(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [])
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.parquet").write_bytes(b"PAR1\x00\x00")
    for sources, out, wanted in (
        ([tmp_path / "none"], None, "does not exist"),
        (
            [path, tmp_path / "empty"],
            None,
            r"empty is a folder without a file of a known format: JSON lines \(\.jsonl\), ",
        ),
        ([tmp_path / "table.parquet"], None, r"is neither text \(JSON lines\) nor of another known format: "),
        ([path], tmp_path, "is a folder"),
        ([path], tmp_path / "link.jsonl", "is the input itself"),
    ):
        with pytest.raises(PredictError, match=wanted):
            check_places(sources, out)
    check_places([], None)
    check_places([path, tmp_path], tmp_path / "new.jsonl")


def test_what_cannot_be_written_leaves_what_was(opened: SavedRun, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"id": f"i{n}", "text": "a", "task": "meld"} for n in range(3)])
    with path.open("rb") as source, Path("/dev/full").open("w") as full, pytest.raises(PredictError, match="No space"):
        predict(opened, source, full.fileno(), Options(), report=print, folder=tmp_path)
    out = write(tmp_path / "out.jsonl", ["before"])
    empty = write(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(PredictError, match="no samples"):
        answers(opened, empty, out)

    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(opened, Broken(), out, Options(), report=print, folder=tmp_path)
    assert out.read_text() == "before\n"
    assert not list(tmp_path.glob(".*"))


# ── the reader alone ─────────────────────────────────────────────────────────────────────────────────────────────────

EXPECTED = {"meld": TaskInput(get_task("meld"), {"audio": 0, "video": 5}, {"audio": None, "video": None})}


def read(lines: list[Any], folder: Path, history: int = 0) -> list[CheckedSample]:
    raw = b"\n".join((x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
    given = open_input(io.BytesIO(raw), EXPECTED, reread=history > 0, folder=folder)
    with UnlabelledReader(given, EXPECTED, history=history) as reader:
        return list(reader)


def test_streams_the_model_was_trained_without_are_not_used(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((7, 6)))
    (line,) = read([{"id": "a", "text": " Hi. ", "audio": "a.npy"}], tmp_path)
    assert line.notes == ["audio: not used, the run's data have none"]
    assert line.sample is not None
    assert (line.sample.text, line.sample.audio_TF) == ("Hi.", None)
    assert math.isnan(line.sample.target)


def test_histories_are_those_of_a_prepared_dataset(tmp_path: Path) -> None:
    folder = prepare_toy("meld", tmp_path)
    view = open_dataset(folder, history=3)["train"]
    order = np.random.default_rng(0).permutation(len(view))
    lines = [
        {"id": s.id, "text": s.text, "speaker": s.speaker, "dialogue": s.dialogue, "turn": s.turn}
        for s in (view[i] for i in order)
    ]
    read_lines = read(lines, tmp_path, history=3)
    assert [line.sample.history for line in read_lines if line.sample] == [view[i].history for i in order]
    unnumbered = [{"id": str(n), "text": f"t{n}", "dialogue": 1, "split": "ab"[n % 2]} for n in range(6)]
    result = [line.sample.history for line in read(unnumbered, tmp_path, history=2) if line.sample]
    assert result[4:] == [[("", "t0"), ("", "t2")], [("", "t1"), ("", "t3")]]
    partly = [*unnumbered[::2], {"id": "x", "text": "tx", "dialogue": 1, "split": "a", "turn": 3}]
    assert all(line.sample and line.sample.history == [] for line in read(partly, tmp_path, history=2))


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        """A pipe of `n` lines, and one of 40 MiB."""

        def __init__(self, n: int) -> None:
            self._lines = self._made(n)

        @staticmethod
        def _made(n: int) -> Iterator[bytes]:
            for i in range(n):  # names beyond the 64 characters up to which the JSON parser keeps some of them
                yield b'{"id": "%070d", "text": "words", "dialogue": "%070d", "turn": 1}\n' % (i, i)
            yield b" " * LONGEST
            yield b" " * LONGEST
            yield b" \n"

        def readline(self, size: int | None = -1) -> bytes:
            return next(self._lines, b"")

    def peak(n: int) -> int:
        tracemalloc.start()
        given = open_input(Endless(n), EXPECTED, folder=tmp_path)  # type: ignore[arg-type]
        with UnlabelledReader(given, EXPECTED) as reader:
            faults = [line.faults for line in reader if line.faults]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert faults == [["is longer than 16 MiB"]]
        return found

    few = min(peak(500), peak(500))  # the first time, modules are loaded
    assert peak(8000) - few < 100_000


def test_no_server_is_contacted_whatever_a_foreign_run_names(run: Path, tmp_path: Path) -> None:
    """Its record and config name a tracking server, and every proxy and hub of the environment is the same trap."""
    theirs = tmp_path / "theirs"
    shutil.copytree(run, theirs)
    write(tmp_path / "in.jsonl", [{"id": "a", "text": "red so", "task": "meld"}])
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        uri = f"http://127.0.0.1:{trap.getsockname()[1]}"
        record = json.loads((theirs / "run.json").read_text())
        (theirs / "run.json").write_text(json.dumps(record | {"mlflow": {"uri": uri, "run_id": "0" * 31 + "1"}}))
        config = yaml.safe_load((theirs / "config.yaml").read_text())
        config["track"] |= {"mlflow": True, "uri": uri}
        (theirs / "config.yaml").write_text(yaml.safe_dump(config))
        proxies = {
            name: uri for word in ("http", "https", "all") for name in (f"{word}_proxy", f"{word.upper()}_PROXY")
        }
        more = {
            **proxies,
            "HF_ENDPOINT": uri,
            "HF_HUB_OFFLINE": "0",
            "MLFLOW_TRACKING_TOKEN": "secret",
            "NO_PROXY": "",
            "no_proxy": "",
        }
        for command in (
            ("evaluate", str(theirs)),
            ("predict", str(theirs), "--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")),
            ("robustness", str(theirs), "--rates", "0,0.5"),
            ("show", str(theirs)),
            ("report", str(theirs)),
            ("runs", str(tmp_path)),
        ):
            done = egmf(*command, **more)
            assert done.returncode == 0, (command, done.stderr)
        with pytest.raises(TimeoutError):
            trap.accept()


WITH_MODULES = """
import sys
from trainer.cli import main
sys.argv = ["egmf", *sys.argv[1:]]
try:
    main()
finally:
    needless = {"deepspeed", "mlflow", "datasets", "pandas", "sklearn", "scipy.optimize", "scipy.stats", "matplotlib",
                "torch._inductor.compile_fx"} & sys.modules.keys()
    assert not needless, needless
    assert {"torch", "transformers", "peft"} <= sys.modules.keys()
"""


def test_what_predict_has_no_use_for_is_not_imported(run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", unlabelled(run, "meld", tmp_path)[:2])
    command = [sys.executable, "-c", WITH_MODULES, "predict", str(run), "--input", str(path), "--out", "-"]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True
    )  # not forked from one that has them
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
