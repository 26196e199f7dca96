"""A recipe of encoders and of a model that transcribes, from clips to answers: also where the models lie in other folders than at training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.distributed.processes import ROOT, egmf
from tests.features.clips import make_wav, read_lines, write_lines
from tests.features.small_encoders import save_convolutional, save_whisper
from trainer.cli import app
from trainer.data.unlabelled.clips import ClipSettings
from trainer.distributed.world import World
from trainer.features.extract import extract
from trainer.features.manifest import read_manifest
from trainer.features.recipe import check_recipe, read_recipe
from trainer.features.recipe_record import recipe_in, record_of
from trainer.results.predict import Options, Tally, predict
from trainer.run.saved import open_run

TASK = "name: heard\nkind: classification\nlabels: [low, high]\nlanguage: en\n"
STEPS = (
    "train.steps=2", "model.backbone.tiny.vocab_size=300", "train.global_batch=8", "train.micro_batch=4", "eval.batch=4",
    "track.mlflow=false", "track.report=false",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound without text, a recipe of small random models, and the run that was trained with both."""
    folder = tmp_path_factory.mktemp("heard")
    save_convolutional("hubert", folder / "hubert")
    save_whisper(folder / "whisper")
    rows: list[dict[str, Any]] = []
    for k in range(12):
        make_wav(folder / f"{k}.wav", 0.4 + k / 50, 120 + 200 * (k % 2))
        split = "train" if k < 6 else "valid" if k < 9 else "test"
        rows.append({"id": f"c{k}", "clip": f"{k}.wav", "label": ("low", "high")[k % 2], "split": split})
    write_lines(folder / "all.jsonl", rows)
    (folder / "heard.yaml").write_text(TASK)
    (folder / "recipe.yaml").write_text(
        f"audio: {{kind: encoder, name: {folder}/hubert}}\ntext: {{kind: whisper, name: {folder}/whisper, language: en}}\n"
    )
    clips = ("--clips", f"{folder}/all.jsonl", "--recipe", f"{folder}/recipe.yaml")
    words = ["prepare", "heard", "--task", f"{folder}/heard.yaml", *clips, "--out", f"{folder}/data"]
    made = CliRunner().invoke(app, words, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    more = (f"task={folder}/heard.yaml", f"data.path={folder}/data", "--out", f"{folder}/run")
    done = egmf("train", f"{ROOT}/configs/tiny.yaml", *STEPS, *more)
    assert done.returncode == 0, done.stderr
    return folder


def test_transcribed_clips_are_answered_as_extracted_first(place: Path, tmp_path: Path) -> None:
    """And with the models in other folders, once these are named."""
    rows = [{key: row[key] for key in ("id", "clip")} for row in read_lines(place / "all.jsonl")]
    source = write_lines(place / "in.jsonl", rows)
    extract(read_manifest(source), read_recipe(place / "recipe.yaml"), tmp_path / "own")
    said = [json.loads(line)["text"] for line in (tmp_path / "own" / "samples.jsonl").read_text().splitlines()]
    assert all(said)
    run = open_run(place / "run", World(0, 1, torch.device("cpu")))

    def answers(given: Path, **encoders: str) -> bytes:
        out, options = tmp_path / "out.jsonl", Options(probabilities=True, clips=ClipSettings(encoders=encoders))
        assert predict(run, [given], out, options, report=print) == Tally(answered=12, bad=0)
        return out.read_bytes()

    extracted = answers(tmp_path / "own")
    for name in ("hubert", "whisper"):
        shutil.move(place / name, tmp_path / name)
    try:
        with pytest.raises(ValueError, match=f"there is no folder {place}/hubert with an encoder"):
            answers(source)
        assert (
            answers(source, **{f"{place}/{name}": f"{tmp_path}/{name}" for name in ("hubert", "whisper")}) == extracted
        )
    finally:
        for name in ("hubert", "whisper"):
            shutil.move(tmp_path / name, place / name)


def test_folders_of_encoders_change_no_recipe(place: Path, tmp_path: Path) -> None:
    record = record_of(read_recipe(place / "recipe.yaml"))
    shutil.copytree(place / "hubert", tmp_path / "elsewhere")
    moved = recipe_in(record, "the recipe", {f"{place}/hubert": str(tmp_path / "elsewhere")})
    assert moved.audio is not None
    assert getattr(moved.audio, "name") == str(tmp_path / "elsewhere")  # noqa: B009
    assert record_of(moved)["hash"] == record["hash"]
    assert recipe_in(record, "the recipe") == check_recipe(record["values"], "values")
    with pytest.raises(ValueError, match=f"the recipe has no encoder hubert; it has {place}/hubert, {place}/whisper"):
        recipe_in(record, "the recipe", {"hubert": "x"})
