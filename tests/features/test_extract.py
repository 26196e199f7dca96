"""Extraction of clips into a folder: what is in it, what is left out, and that it is the same however it came about."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.processes import ROOT, environment
from tests.features.clips import SMALL, contents, make_clip, make_wav, read_lines, write_lines
from trainer.data.dataset import open_dataset
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare
from trainer.data.readers.raw import ReaderError
from trainer.data.readers.source import open_source
from trainer.features.extract import extract
from trainer.features.extraction_folder import ExtractionFolder, RowRecord
from trainer.features.extractor import Extractor
from trainer.features.recipe import Recipe, check_recipe, read_recipe
from trainer.features.recipe_record import RECIPE, read_recipe_record, record_of
from trainer.features.types import Clip
from trainer.tasks import define_task, get_task


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL)
    return read_recipe(path)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of every kind that matters here."""
    folder = tmp_path_factory.mktemp("media")
    make_clip(folder / "whole.mp4", 1.2, 150)
    make_clip(folder / "silent.mkv", 1.0, 0)
    make_clip(folder / "nobody.mp4", 1.0, 300, "grey")
    make_clip(folder / "nothing.mkv", 1.0, 0, "grey")
    make_wav(folder / "heard.wav", 0.9)
    (folder / "text.mp4").write_text("this is no film\n" * 200)
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def rows_of(media: Path) -> list[dict[str, Any]]:
    return [
        {"id": "a/1", "clip": "whole.mp4", "text": "both", "label": "joy", "split": "train", "speaker": "Ann"},
        {
            "id": "a/2",
            "clip": "whole.mp4",
            "start": 0.3,
            "end": 0.9,
            "text": "a part",
            "label": "anger",
            "split": "valid",
        },
        {"id": "b", "clip": "silent.mkv", "text": "seen", "label": "fear", "split": "test"},
        {"id": "c", "clip": "nobody.mp4", "label": "sadness", "split": "train"},
        {"id": "d", "clip": "nothing.mkv", "text": "words alone", "label": "joy", "split": "train"},
        {"id": "e", "clip": "nothing.mkv", "label": "joy", "split": "train"},
        {"clip": "heard.wav", "text": "heard", "label": "joy", "split": "train"},
        {"id": "g", "clip": "text.mp4", "text": "lost", "label": "joy", "split": "train"},
        {"id": "h", "clip": "empty.mp4", "text": "lost", "label": "joy", "split": "train"},
    ]


@pytest.fixture(scope="module")
def manifest(media: Path) -> Path:
    return write_lines(media / "all.jsonl", rows_of(media))


@pytest.fixture(scope="module")
def done(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips extracted by the basic recipe."""
    out = tmp_path_factory.mktemp("done") / "out"
    found = extract(manifest, read_recipe("basic"), out)
    assert found.complete
    assert found.extracted == 9
    return out


def test_own_data(manifest: Path, done: Path) -> None:
    """The rows pass through, and the arrays are what the extractor gives for each clip."""
    recipe = read_recipe("basic")
    extractor = Extractor(recipe)
    lines = {line["id"]: line for line in read_lines(done / "samples.jsonl")}
    assert list(lines) == ["a/1", "a/2", "b", "c", "d", "heard-00007"]
    for row in rows_of(manifest.parent):
        line = lines.get(row.get("id", "heard-00007"))
        if line is None:
            continue
        own = {key: value for key, value in row.items() if key not in ("clip", "start", "end")}
        assert own.items() <= line.items()
        found = extractor.extract(
            Clip(manifest.parent / row["clip"], row.get("start"), row.get("end")), row.get("text")
        )
        for modality, rate in (("audio", 25.0), ("video", 10.0)):
            features = getattr(found, modality)
            if features is None:
                assert modality not in line
                continue
            values_TF = np.load(done / line[modality])
            assert values_TF.dtype == np.float32
            np.testing.assert_array_equal(values_TF, features.values_TF)
            assert not values_TF[~features.valid_T].any()
            assert line[f"{modality}_length"] == len(values_TF)
            assert line["rate"][modality] == rate
    has = {id: [m for m in ("audio", "video") if m in line] for id, line in lines.items()}
    assert has == {
        "a/1": ["audio", "video"], "a/2": ["audio", "video"], "b": ["video"], "c": ["audio"], "d": [], "heard-00007": ["audio"],
    }  # fmt: skip
    assert abs(lines["a/2"]["audio_length"] - 0.6 * 25) <= 1
    assert abs(lines["a/2"]["video_length"] - 0.6 * 10) <= 1


def test_report(done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    assert (report["rows"], report["samples"]) == (9, 6)
    assert report["modalities"] == {"audio": 4, "video": 3, "text": 5}
    assert [(one["id"], one["line"], one["kind"]) for one in report["left_out"]] == [
        ("e", 6, "empty"), ("g", 8, "unreadable"), ("h", 9, "empty"),
    ]  # fmt: skip
    assert report["notes"]["no sound"]["audio"] == 3
    assert report["notes"]["no picture"]["video"] == 1
    assert report["notes"]["no face"]["video"] == 3
    text = (done / "report.txt").read_text()
    assert "left out: 3" in text
    assert "line 8 g (text.mp4): unreadable" in text


def test_the_folder_holds_nothing_else(done: Path) -> None:
    tops = {name.partition("/")[0] for name in contents(done)}
    assert tops == {"recipe.json", "samples.jsonl", "report.json", "report.txt", "rows", "arrays"}
    assert read_recipe_record(done / RECIPE) == record_of(read_recipe("basic"))
    arrays = {line[m] for line in read_lines(done / "samples.jsonl") for m in ("audio", "video") if m in line}
    assert {name for name in contents(done) if name.startswith("arrays/")} == arrays
    assert sum(name.startswith("rows/") for name in contents(done)) == 9


def test_a_dataset_has_true_lengths_and_the_recipe(done: Path, tmp_path: Path) -> None:
    prepare(get_task("meld"), [done / "samples.jsonl"], tmp_path / "data")
    data = open_dataset(tmp_path / "data")
    assert data.record["recipe"] == record_of(read_recipe("basic"))
    assert data.rates == {"audio": 25.0, "video": 10.0}
    lines = {line["id"]: line for line in read_lines(done / "samples.jsonl")}
    for split in ("train", "valid", "test"):
        for sample in data[split]:
            for modality in ("audio", "video"):
                values_TF = getattr(sample, f"{modality}_TF")
                assert (0 if values_TF is None else len(values_TF)) == lines[sample.id].get(f"{modality}_length", 0)


def test_frames_without_a_face_stay_masked(small: Recipe, done: Path, tmp_path: Path) -> None:
    """A face that is only seen in the middle of a clip: the frames of zeros at both ends are no padding."""
    make_clip(tmp_path / "late.mp4", 1.0, 200)
    lines = read_lines(done / "samples.jsonl")[:1]
    source = tmp_path / "own"
    shutil.copytree(done, source)
    path = source / lines[0]["video"]
    values_TF = np.load(path)
    values_TF[:2] = values_TF[-3:] = 0
    np.save(path, values_TF)
    prepare(get_task("meld"), [source / "samples.jsonl"], tmp_path / "data")
    sample = next(one for one in open_dataset(tmp_path / "data")["train"] if one.id == "a/1")
    assert sample.video_mask_T is not None
    assert sample.video_TF is not None
    assert len(sample.video_TF) == len(values_TF)
    assert sample.video_mask_T.tolist() == [False] * 2 + [True] * (len(values_TF) - 5) + [False] * 3
    with pytest.raises(DataError, match="zero_frames=keep: the features were extracted by a recipe"):
        prepare(get_task("meld"), [source / "samples.jsonl"], tmp_path / "kept", zero_frames="keep")


def test_only_what_changed_is_extracted_anew(media: Path, tmp_path: Path) -> None:
    small = check_recipe({"audio": {"kind": "log_mel", "rate": 10, "bands": 8, "pitch": False}}, "here")
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("whole.mp4", "silent.mkv", "heard.wav"):
        shutil.copy(media / name, folder)
    rows: list[dict[str, Any]] = [
        {"clip": "whole.mp4", "text": "a"}, {"clip": "silent.mkv", "text": "b"}, {"clip": "heard.wav", "text": "c"},
    ]  # fmt: skip
    rows = [{"id": str(k), **row} for k, row in enumerate(rows)]
    path, out = folder / "m.jsonl", tmp_path / "out"

    def again() -> int:
        found = extract(write_lines(path, rows), small, out)
        assert found.complete
        return found.extracted

    assert again() == 3
    before = contents(out)
    assert again() == 0
    assert contents(out) == before
    rows[0]["label"] = "joy"
    assert again() == 0  # what is only passed on
    assert read_lines(out / "samples.jsonl")[0]["label"] == "joy"
    rows[1]["end"] = 0.5
    assert again() == 1
    make_wav(folder / "heard.wav", 0.5)
    assert again() == 1
    assert read_lines(out / "samples.jsonl")[2]["audio_length"] == 5
    array = out / read_lines(out / "samples.jsonl")[0]["audio"]
    array.unlink()
    assert again() == 1
    assert array.is_file()
    gone = read_lines(out / "samples.jsonl")[0]
    rows.pop(0)
    assert again() == 0
    assert [line["id"] for line in read_lines(out / "samples.jsonl")] == ["1", "2"]
    assert not (out / gone["audio"]).exists()
    fresh = extract(path, small, tmp_path / "fresh")
    assert fresh.complete
    assert contents(tmp_path / "fresh") == contents(out)


def test_another_recipe_is_refused(small: Recipe, manifest: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    with pytest.raises(ValueError, match=r"(?s)another recipe.*--force.*audio\.bands: 40 there, 8 here") as raised:
        extract(manifest, small, out)
    assert "video.rate: 10 there, 2 here" in str(raised.value)
    assert contents(out) == contents(done)
    rows = write_lines(manifest.parent / "few.jsonl", rows_of(manifest.parent)[:2])
    assert extract(rows, small, out, force=True).extracted == 2
    assert extract(rows, small, tmp_path / "fresh").complete
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_folder_of_something_else_is_refused(small: Recipe, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no extraction made it \(it holds mine.txt\)"):
        extract(manifest, small, tmp_path, force=True)
    with pytest.raises(ValueError, match="is a file"):
        extract(manifest, small, tmp_path / "mine.txt")


def test_a_clip_that_takes_too_long_is_tried_again(small: Recipe, media: Path, tmp_path: Path) -> None:
    path = write_lines(media / "one.jsonl", [{"id": "a", "clip": "whole.mp4", "text": "x"}])
    found = extract(path, small, tmp_path / "out", time_limit=1e-3)
    assert [one["kind"] for one in found.report["left_out"]] == ["timed out"]
    assert read_lines(tmp_path / "out" / "samples.jsonl") == []
    found = extract(path, small, tmp_path / "out")
    assert (found.extracted, found.report["left_out"]) == (1, [])


def test_arguments(small: Recipe, manifest: Path, tmp_path: Path) -> None:
    for options, reason in (
        ({"shard": (3, 2)}, "shard 3/2"),
        ({"workers": 0}, "workers"),
        ({"time_limit": 0.0}, "time limit"),
        ({"device": "gpu"}, "--device is auto"),
    ):
        with pytest.raises(ValueError, match=reason):
            extract(manifest, small, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_sources_of_several_recipes_are_refused(small: Recipe, manifest: Path, done: Path, tmp_path: Path) -> None:
    rows = write_lines(manifest.parent / "first.jsonl", rows_of(manifest.parent)[:1])
    extract(rows, small, tmp_path / "other")
    with pytest.raises(ReaderError, match=r"(?s)another recipe than.*audio\.bands: 40 there, 8 here"):
        prepare(get_task("meld"), [done, tmp_path / "other"], tmp_path / "data")
    plain = write_lines(tmp_path / "train.jsonl", [{"id": "z", "text": "x", "label": "joy"}])
    with pytest.raises(
        ReaderError, match=r"has recipe basic \([0-9a-f]{16}\), .* has no recipe: features of one dataset"
    ):
        prepare(get_task("meld"), [done, plain], tmp_path / "data")


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A manifest of 40 tiny clips, and a recipe."""
    folder = tmp_path_factory.mktemp("many")
    rows = []
    for k in range(40):
        name = f"{k}.wav" if k % 4 == 3 else f"{k}.mp4"
        if k % 4 == 3:
            make_wav(folder / name, 0.4 + k / 100, 150 + 5 * k)
        elif k < 4:
            make_clip(folder / name, 0.5 + k / 20, 150 + 5 * k)
        else:
            shutil.copy(folder / f"{k % 4}.mp4", folder / name)
        rows.append({"clip": name, "text": f"clip {k}", "label": "joy", "split": "train"})
    (folder / "38.mp4").write_bytes((folder / "38.mp4").read_bytes()[:300])
    (folder / "small.yaml").write_text(SMALL)
    return write_lines(folder / "m.jsonl", rows), folder / "small.yaml"


def start(manifest: Path, recipe: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`egmf extract` in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "trainer",
        "extract",
        str(manifest),
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(many: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an extraction that nothing interrupted makes of them."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert start(*many, out, "--workers", "2").wait(120) == 1
    report = json.loads((out / "report.json").read_text())
    assert (report["rows"], [one["id"] for one in report["left_out"]]) == (40, ["38-00039"])
    return contents(out)


def test_killed_and_continued(many: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    rng, out = random.Random(7), tmp_path / "out"
    kills = 0
    while kills < 4:
        aim = finished(out) + rng.randint(2, 9)
        process = start(*many, out)
        until = time.monotonic() + 60
        while process.poll() is None and finished(out) < aim and time.monotonic() < until:
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        assert not (out / "samples.jsonl").exists()
    assert kills >= 3
    assert start(*many, out, "--workers", "2").wait(120) == 1
    assert contents(out) == whole


def finished(out: Path) -> int:
    """Rows that are done."""
    return sum(not path.name.startswith(".") for path in out.glob("rows/*/*.json"))


def test_shards(many: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    """Three processes at once, of which the last to end writes own data."""
    parts = [start(*many, tmp_path / "out", "--shard", f"{k}/3") for k in (1, 2, 3)]
    codes = [part.wait(120) for part in parts]
    assert set(codes) <= {0, 1}
    assert codes[2] == 1  # row 39 is of the third shard, and cannot be read
    assert contents(tmp_path / "out") == whole


def test_names_that_are_not_utf_8(small: Recipe, tmp_path: Path) -> None:
    """A file whose name is in Latin-1 comes into JSON as a lone surrogate, and from there everywhere."""
    name = os.fsdecode(b"caf\xe9.wav")
    make_wav(tmp_path / name, 0.5)
    (tmp_path / "\udce9.mp4").write_bytes(b"no film")
    manifest = tmp_path / "m.jsonl"
    rows = [{"clip": name, "text": "\ud800"}, {"clip": "\udce9.mp4"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "extract", manifest, "--recipe", recipe_file(small, tmp_path), "--out", out, "--json"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert [one["id"] for one in json.loads(done.stdout)["left_out"]] == ["\udce9-00002"]
    (sample,) = read_lines(out / "samples.jsonl")
    assert (sample["id"], sample["text"]) == (f"{Path(name).stem}-00001", "\ud800")
    assert json.loads((out / "report.json").read_text())["left_out"][0]["clip"] == "\udce9.mp4"
    assert "\\udce9.mp4" in (out / "report.txt").read_text()
    assert extract(manifest, small, out).extracted == 0


def recipe_file(recipe: Recipe, folder: Path) -> Path:
    """The recipe as a file; JSON is YAML."""
    path = folder / "recipe.yaml"
    path.write_text(recipe.model_dump_json())
    return path


def test_a_full_disk_is_told(media: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: ExtractionFolder, record: RowRecord) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    manifest = write_lines(media / "one.jsonl", rows_of(media)[6:7])
    with monkeypatch.context() as patched:
        patched.setattr(ExtractionFolder, "write_row", full)
        with pytest.raises(ValueError, match=r"No space left.*goes on"):
            extract(manifest, small, tmp_path / "out")
    assert extract(manifest, small, tmp_path / "out").extracted == 1


def test_a_manifest_where_features_are_read(tmp_path: Path) -> None:
    """Clips are no features: where a manifest is given in their place, that is said."""
    task = define_task({"name": "mine", "kind": "classification", "labels": ["joy", "fear"], "language": "en"})
    rows = [{"clip": "a.mp4", "text": "so", "label": "joy", "split": "train"}]
    (note,) = [note for note in open_source(task, [write_lines(tmp_path / "m.jsonl", rows)]).notes if "egmf" in note]
    assert note.startswith("m.jsonl: no sound and no pictures; a manifest of clips goes to egmf extract")
    (tmp_path / "m.csv").write_text("clip,text,label,split\na.mp4,so,joy,train\n")
    with pytest.raises(ReaderError, match="a manifest of clips goes to egmf extract"):
        open_source(task, [tmp_path / "m.csv"])


def test_an_end_behind_that_of_the_file_is_told(media: Path, small: Recipe) -> None:
    """Times of annotations are rounded, but milliseconds in place of seconds should be seen."""
    extractor = Extractor(small)
    near, far = (extractor.extract(Clip(media / "heard.wav", end=end), "so") for end in (1.3, 9.0))
    assert [note.kind for note in near.notes] == ["no picture"]
    (told,) = [note for note in far.notes if note.kind == "truncated"]
    assert (told.modality, told.text) == ("audio", "end 9 is behind the end of the file, at 0.90 s")
    assert far.audio is not None
    assert near.audio is not None
    assert np.array_equal(far.audio.values_TF, near.audio.values_TF)


def test_a_folder_of_something_else_stays_as_it_is(media: Path, small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no extraction made it \(it holds thesis\.txt\)"):
        extract(write_lines(media / "one.jsonl", rows_of(media)[6:7]), small, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_the_command_says_what_is_wrong(many: tuple[Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from trainer.cli import app

    runner = CliRunner()
    manifest, recipe = map(str, many)
    for more, reason in (
        (["--shard", "4/3"], "--shard is I/N"),
        (["--recipe", "basik"], "did you mean basic"),
        (["--recipe", recipe, "--device", "tpu"], "--device is auto"),
    ):
        recipe_given = [] if "--recipe" in more else ["--recipe", recipe]
        found = runner.invoke(app, ["extract", manifest, *recipe_given, "--out", str(tmp_path / "x"), *more])
        assert reason in str(found.exception)
