"""Manifests of clips: what is passed on, and that all faults come at once, each with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.features.clips import write_lines
from trainer.data.readers.raw import SPLIT_NAMES
from trainer.features.manifest import KNOWN, ManifestError, read_manifest
from trainer.features.types import Clip
from trainer.own_samples import Line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files a.mp4 and clips/b.wav; a manifest asks only that they are there."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "clips" / "b.wav").write_bytes(b"b")
    return tmp_path


def faults_of(path: Path) -> list[str]:
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    assert str(path) in str(raised.value)
    return raised.value.faults


def test_keys_pass_untouched(folder: Path) -> None:
    own: dict[str, Any] = {
        "id": 7, "text": "Ünd so ", "label": {"joy": 2}, "split": "dev", "fold": 3, "speaker": 1, "dialogue": "d", "turn": 4,
        "kind": "k", "language": "de", "session": [1, 2.50],
    }  # fmt: skip
    rows = [{"clip": "a.mp4", "start": 1, "end": 2.5, **own}, {"target": 0.5, "clip": "clips/b.wav"}]
    manifest = read_manifest(write_lines(folder / "m.jsonl", rows))
    first, second = manifest.rows
    assert (first.id, first.clip, first.values) == ("7", Clip(folder / "a.mp4", 1.0, 2.5), own)
    assert list(first.values) == list(own)
    assert (second.id, second.clip) == ("b-00002", Clip(folder / "clips" / "b.wav"))
    assert second.values == {"id": "b-00002", "target": 0.5}
    assert [row.line for row in manifest.rows] == [1, 2]
    assert manifest.notes == ["m.jsonl: 'session' of 1 row(s) is no key of own data: passed on"]


def test_every_key_of_own_data_is_known() -> None:
    assert set(Line.model_fields) <= set(KNOWN)


def test_csv(folder: Path) -> None:
    path = folder / "valid.csv"
    path.write_text(
        "clip,id,text,start,end,turn,target,label,speaker\r\n"
        'a.mp4,007,"two\nlines, and a comma",0.5,1,3,-0.25,"{""joy"": 1}",12\r\n'
        "\r\n"
        "clips/b.wav,,,,,,,joy,\r\n",
        encoding="utf-16",
    )
    manifest = read_manifest(path)
    first, second = manifest.rows
    assert first.clip == Clip(folder / "a.mp4", 0.5, 1.0)
    assert first.values == {
        "id": "007", "text": "two\nlines, and a comma", "turn": 3, "target": -0.25, "label": {"joy": 1}, "speaker": "12", "split": "valid",
    }  # fmt: skip
    assert second.values == {"id": "b-00002", "label": "joy", "split": "valid"}
    assert [row.line for row in manifest.rows] == [3, 5]


def test_csv_of_a_spreadsheet(folder: Path) -> None:
    """A mark at the beginning, empty columns behind the others, and a name in capitals."""
    path = folder / "ALL.CSV"
    path.write_text("clip,label,,\r\na.mp4,joy,,\r\n,,,\r\n", encoding="utf-8-sig")
    (row,) = read_manifest(path).rows
    assert (row.clip, row.values) == (Clip(folder / "a.mp4"), {"id": "a-00001", "label": "joy"})


@pytest.mark.parametrize("name", ["train", "dev", "my-test"])
def test_the_name_of_the_file_is_the_split(folder: Path, name: str) -> None:
    rows = [{"clip": "a.mp4"}, {"clip": "a.mp4", "split": "test"}, {"clip": "a.mp4", "fold": 1}]
    manifest = read_manifest(write_lines(folder / f"{name}.jsonl", rows))
    split = SPLIT_NAMES[name.split("-")[-1]]
    assert [row.values.get("split") for row in manifest.rows] == [split, "test", None]


def test_all_faults_at_once(folder: Path) -> None:
    lines = [
        '{"clip": "a.mp4", "lable": "joy"}',
        '{"clip": "gone.mp4"}',
        '{"clip": "clips"}',
        '{"clip": "a.mp4", "start": 3, "end": 3}',
        '{"clip": "a.mp4", "start": "3"}',
        '{"clip": "a.mp4", "end": -1}',
        '{"clip": "a.mp4", "end": NaN}',
        '{"text": "no clip"}',
        '{"clip": 5}',
        '{"clip": "' + "x" * 5000 + '.mp4"}',
        '{"clip": "a.mp4", "id": "x"}',
        '{"clip": "a.mp4", "id": "x"}',
        '{"clip": "a.mp4", "audio": "a.npy", "rate": {"audio": 3}}',
        '{"clip": "a.mp4", "turn": "first"}',
        "{broken",
        "[1]",
        "",
        '{"clip": "a.mp4", "labels": ["joy"], "speaker_id": 4, "speaker": 4}',
    ]
    path = folder / "m.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = faults_of(path)
    expected = [
        "line 1: unknown key 'lable' (did you mean label?)",
        f"line 2: clip {folder}/gone.mp4 does not exist",
        f"line 3: clip {folder}/clips is no regular file",
        "line 4: start (3) is not before end (3)",
        "line 5: start: '3' is not a number of seconds",
        "line 6: end: -1 is not a number of seconds",
        "line 7: end: nan is not a number of seconds",
        "line 8: clip: missing",
        "line 9: clip: not '5'",
        f"line 10: clip {folder}/xxx",
        "line 12: duplicate id ('x' is that of line 11)",
        "line 13: audio: is written by the extraction",
        "line 13: rate: is written by the extraction",
        "line 14: turn: ",
        "line 15: is no JSON",
        "line 16: is no JSON object",
    ]
    assert len(found) == len(expected), found
    for begin in expected:
        assert any(fault.startswith(begin) for fault in found), (begin, found)


def test_faults_of_csv(folder: Path) -> None:
    path = folder / "m.csv"
    path.write_text("clip,start,turn,target,lable\na.mp4,one,1.5,x,joy\na.mp4,1,2\na.mp4,,,,\n", encoding="utf-8")
    assert faults_of(path) == [
        "line 2: start: 'one' is not a number",
        "line 2: turn: '1.5' is not a whole number",
        "line 2: target: 'x' is not a number",
        "line 3: has 3 fields, the header 5",
    ]
    path.write_text("file,text\na.mp4,x\n", encoding="utf-8")
    assert faults_of(path) == ["line 1: has no column clip; it has file, text"]
    path.write_text("clip;end\na.mp4;0,5\n", encoding="utf-8-sig")
    assert "separated by semicolons" in faults_of(path)[0]
    path.write_text("clip\tend\na.mp4\t0.5\n", encoding="utf-16")
    assert "separated by tabs" in faults_of(path)[0]
    path.write_text("clip,,\na.mp4,,\na.mp4,,x\n", encoding="utf-8")
    assert faults_of(path) == ["line 3: 'x' stands in a column without a name"]
    path.write_text('clip,text\na.mp4,"open\n', encoding="utf-8")
    assert faults_of(path)[0].startswith("line 2: is not valid CSV")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("m.jsonl", b"", "it has no rows"),
        ("m.jsonl", b'[{"clip": "a.mp4"}]', "it is one JSON list"),
        ("m.jsonl", b'{"clip": "\xe9\xe8\xe7"}', "line 1"),
        ("m.txt", b"", "its name ends in '.txt'"),
        ("m.csv", b"", "line 1: has no column clip; it has none"),
    ],
)
def test_no_manifest(folder: Path, name: str, content: bytes, fault: str) -> None:
    (folder / name).write_bytes(content)
    assert faults_of(folder / name)[0].startswith(fault)


def test_no_file(folder: Path) -> None:
    assert faults_of(folder / "none.jsonl") == ["it does not exist"]


def test_ids_are_stable_and_unique(folder: Path) -> None:
    """The id of a row does not depend on the rows behind it, and the same clip may stand in many rows."""
    rows: list[dict[str, Any]] = [{"clip": "a.mp4", "start": k, "end": k + 1} for k in range(3)]
    ids = [row.id for row in read_manifest(write_lines(folder / "m.jsonl", rows)).rows]
    more = [row.id for row in read_manifest(write_lines(folder / "m.jsonl", [*rows, {"clip": "a.mp4"}])).rows]
    assert ids == ["a-00001", "a-00002", "a-00003"] == more[:3]
    made = [{"clip": "a.mp4"}, {"clip": "a.mp4", "id": "a-00001"}]
    assert faults_of(write_lines(folder / "m.jsonl", made)) == ["line 2: duplicate id ('a-00001' is that of line 1)"]


def test_long_reports_are_cut(folder: Path) -> None:
    rows = [{"clip": f"gone-{k}.mp4"} for k in range(30)]
    with pytest.raises(ManifestError, match=r"30 faults(.|\n)*and 10 more") as raised:
        read_manifest(write_lines(folder / "m.jsonl", rows))
    assert len(raised.value.faults) == 30
    assert json.dumps(str(raised.value))
