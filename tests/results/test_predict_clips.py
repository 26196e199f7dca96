"""From clips to a dataset, a run and answers: extracted on the fly as extracted first, and never by another recipe than the run's."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from tests.distributed.processes import egmf
from tests.features.clips import SMALL, contents, read_lines, write_lines
from tests.tones import make_tones
from trainer import Predictor
from trainer.cli import app
from trainer.data.dataset import open_dataset
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.manifest_labels import check_labels
from trainer.data.preparation.summary import summary_json
from trainer.data.unlabelled.clips import ClipsError, ClipSettings
from trainer.data.unlabelled.inputs import PredictError
from trainer.distributed.world import World
from trainer.features.extract import extract
from trainer.features.identity import Identity
from trainer.features.manifest import read_manifest
from trainer.features.recipe import read_recipe
from trainer.features.recipe_record import RecipeRecord, record_of
from trainer.results.predict import Options, Tally, predict
from trainer.run.recipes import RecipeError
from trainer.run.saved import SavedRun, open_run
from trainer.serving.prediction import Prepared, Rejected
from trainer.tasks import define_task

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with labels, and what `egmf prepare` and `egmf train` made of them."""
    return make_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def opened(place: Path) -> SavedRun:
    return open_run(place / "run", WORLD)


def answers(run: SavedRun, source: Path, out: Path, options: Options | None = None) -> tuple[Tally, bytes, list[str]]:
    told: list[str] = []
    tally = predict(run, [source], out, options or Options(probabilities=True, gates=True), report=told.append)
    return tally, out.read_bytes(), told


def unlabelled(place: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "label"} for row in read_lines(place / "all.jsonl")]


def test_the_recipe_is_kept_everywhere(place: Path, opened: SavedRun) -> None:
    recipe = record_of(read_recipe(place / "small.yaml"))
    assert json.loads((place / "data-clips" / "recipe.json").read_text()) == recipe
    assert json.loads((place / "data" / "record.json").read_text())["recipe"] == recipe
    assert json.loads((place / "run" / "run.json").read_text())["recipe"] == {"tones": recipe}
    assert {name: one.recipe for name, one in opened.parts.inputs.items()} == {"tones": recipe}
    shown = CliRunner().invoke(app, ["data", "show", f"{place}/data"], catch_exceptions=False)
    assert recipe["hash"][:16] in shown.output
    summary = summary_json(open_dataset(place / "data").record)
    assert summary["train"]["recipe"]["hash"] == recipe["hash"]


def test_on_the_fly_is_extracting_first(place: Path, opened: SavedRun, tmp_path: Path) -> None:
    """Bit by bit: the same lines, with probabilities and gate weights in full precision."""
    rows = unlabelled(place)
    rows[3]["end"] = 0.35
    del rows[4]["id"], rows[7]["id"]  # both name such a row alike
    source = write_lines(place / "in.jsonl", rows)
    tally, direct, told = answers(opened, source, tmp_path / "direct.jsonl")
    assert (tally, told) == (Tally(answered=18, bad=0), [line for line in told if "no picture" in line])
    extract(source, read_recipe(place / "small.yaml"), tmp_path / "own", workers=2)
    first, then, silent = answers(opened, tmp_path / "own", tmp_path / "first.jsonl")
    assert (first, silent) == (tally, [])
    assert direct == then
    several = Options(probabilities=True, gates=True, clips=ClipSettings(workers=2))
    assert answers(opened, source, tmp_path / "workers.jsonl", several)[1] == direct


def test_bad_clips_cost_their_row_only(place: Path, opened: SavedRun, tmp_path: Path) -> None:
    (place / "text.mp4").write_text("no film\n" * 100)
    bad = [
        {"id": "x1", "clip": "text.mp4", "text": "a"},
        {"id": "x2", "clip": "gone.mp4", "text": "a"},
        {"id": "x3", "clip": "0.mp4", "start": 3, "end": 2, "text": "a"},
        {"id": "x4", "cilp": "0.mp4", "text": "a"},
        {"id": "x5", "clip": "0.mp4", "video": "0.npy", "text": "a"},
    ]
    good = unlabelled(place)
    mixed = [bad[0], *good[:2], *bad[1:4], *good[2:]]
    tally, found, told = answers(opened, write_lines(place / "mixed.jsonl", mixed), tmp_path / "mixed.jsonl")
    assert tally == Tally(answered=18, bad=4)
    assert found == answers(opened, write_lines(place / "good.jsonl", good), tmp_path / "good.jsonl")[1]
    left = [line for line in told if "left out" in line]
    assert left[0].startswith("line 1: left out: unreadable: ")
    assert left[1] == f"line 4: left out: clip {place}/gone.mp4 does not exist"
    assert left[2] == "line 5: left out: start (3) is not before end (2)"
    assert left[3] == "line 6: left out: unknown key 'cilp' (did you mean clip?)"
    tally, _, told = answers(opened, write_lines(place / "both.jsonl", [bad[4]]), tmp_path / "both.jsonl")
    assert tally == Tally(answered=0, bad=1)
    assert "no video file" in told[0]


def test_a_predictor_extracts_clips_as_the_command_does(
    place: Path, opened: SavedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = unlabelled(place)[:6]
    source = write_lines(place / "six.jsonl", rows)
    expected = [json.loads(line) for line in answers(opened, source, tmp_path / "out.jsonl")[1].splitlines()]
    predictor = Predictor(opened)
    whole = [row | {"clip": place / row["clip"]} for row in rows]
    assert [one.plain() for one in predictor.predict(whole)] == expected
    good, bad = predictor.prepare([place / "0.mp4", place / "gone.mp4"])
    assert isinstance(good, Prepared)
    assert good.id == "0-00001"
    assert good.sample.audio_TF is not None
    assert isinstance(bad, Rejected)
    assert bad.faults == (f"clip {place}/gone.mp4 does not exist",)
    assert list(predictor.recipes) == ["tones"]
    assert not caplog.records
    for _ in range(2):  # nothing says how these were extracted
        predictor.predict([{"text": "a", "audio": good.sample.audio_TF}])
    (warning,) = (record.message for record in caplog.records)
    assert warning.startswith("the run's data were extracted by recipe audio log_mel, video landmarks")


def test_a_time_limit_is_more_than_nothing() -> None:
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="the time limit must be more than 0 seconds"):
            ClipSettings(time_limit=seconds)


def test_a_split_of_clips(place: Path, opened: SavedRun, tmp_path: Path) -> None:
    _, found, _ = answers(opened, place / "all.jsonl", tmp_path / "out.jsonl", Options(split="test"))
    assert [json.loads(line)["id"] for line in found.decode().splitlines()] == [f"c{k}" for k in range(14, 18)]


def test_a_table_of_clips_is_answered_as_its_lines(place: Path, opened: SavedRun, tmp_path: Path) -> None:
    rows = unlabelled(place)[:5]
    rows[2]["text"] = 'two\nlines, "quoted"'
    _, expected, _ = answers(opened, write_lines(place / "lines.jsonl", rows), tmp_path / "lines.jsonl")
    with (place / "table.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["id", "clip", "text", "dialogue", "turn"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        table.writerow({"id": "gone", "clip": "gone.mp4"})
    tally, found, told = answers(opened, place / "table.csv", tmp_path / "table.jsonl")
    assert tally == Tally(answered=5, bad=1)
    assert found == expected
    assert told[-1] == f"line 8: left out: clip {place}/gone.mp4 does not exist"  # the third row has two lines
    (place / "table.csv").write_text("id,clip,turn\na,0.mp4,first\nb,1.mp4,x\n")
    with pytest.raises(PredictError, match="has 2 faults:\n  line 2: turn: 'first' is not a whole number"):
        answers(opened, place / "table.csv", tmp_path / "table.jsonl")


def test_labels_are_checked_before_a_clip_is_read(place: Path, tmp_path: Path) -> None:
    rows = read_lines(place / "all.jsonl")
    rows[1]["label"], rows[12]["label"], rows[13]["label"] = "hihg", "lwo", None
    manifest = write_lines(place / "wrong.jsonl", rows)
    words = [
        "prepare",
        "tones",
        "--task",
        f"{place}/tones.yaml",
        "--clips",
        str(manifest),
        "--recipe",
        f"{place}/small.yaml",
    ]
    made = egmf(*words, "--out", f"{tmp_path}/data")
    assert made.returncode == 1
    assert f"{manifest} has labels that cannot be used; no clip was read:" in made.stderr
    assert "unknown label: 2 (train 1, valid 1)" in made.stderr
    assert "no label: 1 (valid 1)" in made.stderr
    assert list(tmp_path.iterdir()) == []
    definition, read = define_task(yaml.safe_load((place / "tones.yaml").read_text())), read_manifest(manifest)
    check_labels(definition, read, "all")
    with pytest.raises(DataError, match=r"unknown label: 1 \(valid 1\)"):
        check_labels(definition, read, "train")


def test_the_command(place: Path, tmp_path: Path) -> None:
    rows = [*unlabelled(place)[:2], {"id": "bad", "clip": "gone.mp4"}]
    source = write_lines(place / "few.jsonl", rows)
    done = egmf(
        "predict", str(place / "run"), "--input", str(source), "--out", str(tmp_path / "out.jsonl"), "--workers", "2"
    )
    assert done.returncode == 1
    assert "answered: 2 sample(s); left out: 1" in done.stderr
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == ["c0", "c1"]


def test_own_data_of_another_recipe(place: Path, opened: SavedRun, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(SMALL.replace("rate: 10", "rate: 20"))
    extract(place / "all.jsonl", read_recipe(tmp_path / "other.yaml"), tmp_path / "own")
    for source in (tmp_path / "own", tmp_path / "own" / "samples.jsonl"):
        with pytest.raises(
            PredictError, match=r"(?s)another recipe than the run's data of tones.*audio\.rate: 10 there, 20 here"
        ):
            answers(opened, source, tmp_path / "out.jsonl")
    words = [
        "prepare",
        "tones",
        "--task",
        f"{place}/tones.yaml",
        "--source",
        f"{tmp_path}/own",
        "--out",
        f"{tmp_path}/data",
    ]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    with pytest.raises(RecipeError, match=r"(?s)another recipe than the run .*audio\.rate: 10 there, 20 here"):
        open_run(place / "run", WORLD, data=str(tmp_path / "data"))
    continued = egmf(
        "train", str(place / "run" / "config.yaml"), f"data.path={tmp_path}/data", "--out", str(place / "run")
    )
    assert continued.returncode == 1
    assert "audio.rate: 10 there, 20 here" in continued.stderr


def test_own_data_without_a_recipe_is_a_warning(
    place: Path, opened: SavedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own"
    shutil.copytree(place / "data-clips", own)
    (own / "recipe.json").unlink()
    assert answers(opened, own / "samples.jsonl", tmp_path / "out.jsonl")[0].answered == 18
    assert [record.message.partition(" (")[0] for record in caplog.records].count(
        "the run's data were extracted by recipe audio log_mel, video landmarks"
    ) == 1
    caplog.clear()
    answers(opened, place / "all.jsonl", tmp_path / "out.jsonl")
    assert not caplog.records


def changed_run(place: Path, folder: Path, change: Callable[[RecipeRecord], RecipeRecord | None]) -> Path:
    """A copy of run and data whose recipe is another; None: none."""
    shutil.copytree(place / "run", folder / "run")
    shutil.copytree(place / "data", folder / "data")
    path = folder / "data" / "record.json"
    record = json.loads(path.read_text())
    recipe = change(record.pop("recipe"))
    path.write_text(json.dumps(record if recipe is None else {**record, "recipe": recipe}))
    path = folder / "run" / "run.json"
    values = json.loads(path.read_text())
    del values["recipe"]
    path.write_text(json.dumps(values if recipe is None else {**values, "recipe": {"tones": recipe}}))
    return folder / "run"


def test_a_machine_that_extracts_otherwise(place: Path, tmp_path: Path) -> None:
    def older(recipe: RecipeRecord) -> RecipeRecord:
        there = Identity(recipe["values"], recipe["weights"], {**recipe["versions"], "librosa": "0.1"}, recipe["code"])
        return there.plain()  # type: ignore[return-value]

    run = open_run(changed_run(place, tmp_path, older), WORLD, [f"data.path={tmp_path}/data"])
    with pytest.raises(
        ClipsError, match=r"this machine does not extract as the run's data were extracted:\n  librosa: 0\.1 there, "
    ):
        answers(run, place / "all.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_without_a_recipe(place: Path, tmp_path: Path) -> None:
    run = open_run(changed_run(place, tmp_path, lambda recipe: None), WORLD, [f"data.path={tmp_path}/data"])
    with pytest.raises(ClipsError, match="line 1 names a clip, and the run's data come from no recipe"):
        answers(run, place / "all.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ClipsError, match=r"samples\[0\] names a clip, and the run's data come from no recipe"):
        Predictor(run).predict([place / "0.mp4"])
    assert answers(run, place / "data-clips", tmp_path / "out.jsonl")[0].answered == 18


def test_prepare_from_clips(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be done together is refused before a clip is read; a clip that is left out makes the exit code 1, and the rest is prepared."""
    base = ["prepare", "tones", "--task", f"{place}/tones.yaml", "--out", f"{tmp_path}/data"]
    clips = ["--clips", f"{place}/all.jsonl"]
    for more, reason in (
        ([], "needs --source .* or --clips"),
        (clips, "--clips needs --recipe"),
        ([*clips, "--recipe", "basic", "--source", "x"], "two kinds of source"),
        ([*clips, "--recipe", "basic", "--zero-frames", "keep"], "--zero-frames keep"),
        (["--source", "x", "--recipe", "basic"], "belong to --clips"),
        ([*clips, "--recipe", "basic", "--arrays", f"{tmp_path}/data"], "--arrays is the folder of the dataset"),
    ):
        with pytest.raises(ValueError, match=reason):
            CliRunner().invoke(app, [*base, *more], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
    (place / "text.mp4").write_text("no film\n" * 100)
    rows = [
        *read_lines(place / "all.jsonl"),
        {"id": "bad", "clip": "text.mp4", "text": "a", "label": "low", "split": "train"},
    ]
    source = write_lines(place / "with-bad.jsonl", rows)
    words = [*base, "--clips", str(source), "--recipe", f"{place}/small.yaml", "--arrays", f"{tmp_path}/arrays"]
    assert typer.main.get_command(app).main(words, standalone_mode=False) == 1
    assert "left out: unreadable" in capsys.readouterr().err
    good = json.loads((place / "data" / "record.json").read_text())
    assert json.loads((tmp_path / "data" / "record.json").read_text())["fingerprint"] == good["fingerprint"]
    assert {k for k in contents(tmp_path / "arrays") if k.endswith(".npy")} == {
        k for k in contents(place / "data-clips") if k.endswith(".npy")
    }
    assert np.load(next((tmp_path / "arrays").glob("arrays/*/*.audio.npy"))).shape[1] == 9
