"""A few hundred damaged feature files of every format; `benchmarks/fuzz.py` does the same to thousands."""

from __future__ import annotations

import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fuzz
from tests.data import fuzzing
from tests.data.fuzzing import Bench, Broken, Watch, formats, mutate, npy, npz
from trainer.data.readers.jsonl import load_features
from trainer.data.readers.raw import ReaderError
from trainer.data.readers.source import open_source
from trainer.tasks import get_task

FORMATS = formats()


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path, watch: Watch) -> None:
    form, draw = FORMATS[name], random.Random(f"{name} 20261121")
    bench = Bench(form, tmp_path)
    ends = [bench.run(data) for data in form.honest]
    assert ends[0] == "written"  # the honest source is one
    for _ in range(40):
        data = mutate(draw.choice(form.honest), draw)
        with watch.over(tmp_path) as seen:
            ends.append(bench.run(data))
        assert not seen, data
    assert ends.count("refused") > 5


# ── that a fault would show ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_bench_sees_what_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(FORMATS["JSON lines"], tmp_path)

    def leaves(*_: object, **__: object) -> None:
        (bench.out.parent / "half").mkdir()
        raise ValueError("refused")

    def silent(*_: object, **__: object) -> None:
        raise ValueError

    def warns(*_: object, **__: object) -> None:
        warnings.warn("look", stacklevel=1)
        raise ValueError("refused")

    for fault, wanted in ((leaves, "left behind"), (silent, "says nothing"), (warns, "look")):
        monkeypatch.setattr(fuzzing, "prepare", fault)
        with pytest.raises(Broken, match=wanted):
            bench.run(b"{}")
        bench.clear()


def test_the_watch_sees_what_acts(tmp_path: Path, watch: Watch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    with watch.over(inside) as seen:
        (inside / "a").write_text("a")
        (inside / "a").unlink()
    assert seen == []
    with watch.over(inside) as seen:
        os.system("true")
        exec("1")
        outside.write_text("a")
        outside.unlink()
    assert [event.split()[0] for event in seen] == ["os.system", "exec", "open", "os.remove"]


def test_a_worker_that_dies_or_hangs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text("written 0.1\n")
    monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    monkeypatch.setattr(fuzz, "START", 0.5)
    output = [
        fuzz._watch([sys.executable, "-c", code], tmp_path) for code in ("import os; os.abort()", "while 1: pass", "")
    ]
    assert [None if reason is None else reason.split(":")[0] for reason in output] == ["crash", "hang", None]


# ── what it found ────────────────────────────────────────────────────────────────────────────────────────────────────


def damaged(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def test_damaged_arrays_say_what_they_are(tmp_path: Path) -> None:
    sound = npy(np.ones((4, 3), "f4"))
    open_bracket = damaged(sound, b"(4, 3), }", b"(4, 3),  ")
    cases = {"bracket.npy": open_bracket, "bracket.npz": npz(open_bracket)}
    deflated = bytearray(npz(sound, 8))
    at = deflated.index(b"audio.npy") + len(b"audio.npy")
    deflated[at : at + 20] = b"\xff" * 20
    cases["deflate.npz"] = bytes(deflated)
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is not a readable"):
            load_features(tmp_path / name, "audio")


def test_damage_behind_the_header_names_line_and_file(tmp_path: Path) -> None:
    data = bytearray(npz(npy(np.ones((20_000, 3), "f4"))))  # more than zipfile reads along with the header
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "joy", "audio": "a.npz"}\n')
    source = open_source(get_task("meld"), [tmp_path / "train.jsonl"])
    with pytest.raises(ReaderError, match=r"train.jsonl line 1: audio file .*a\.npz cannot be read: .*CRC"):
        list(source.samples("train"))


def test_unknown_keys_are_counted_whatever_they_hold(tmp_path: Path) -> None:
    line = '{"text": "a", "label": "joy", "colour": %s, "zone": %s}\n'
    (tmp_path / "train.jsonl").write_text(line % ('"red"', "null") + line % ("null", "{}") + line % ("2", "1"))
    source = open_source(get_task("meld"), [tmp_path / "train.jsonl"])
    assert source.notes == ["train.jsonl: not used: 'colour' of 3 line(s), 'zone' of 3 line(s)"]


def test_escapes_that_python_does_not_know_are_read_quietly(tmp_path: Path) -> None:
    bench = Bench(FORMATS["list pickle"], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bench.run(b"(lp0\nS'a\\d'\na.") == "refused"
