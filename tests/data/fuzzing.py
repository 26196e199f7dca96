"""Damaged feature files: honest seeds of every format, a seeded mutator, and what must hold for each case.

Used by the tests (a few hundred cases) and by ``benchmarks/fuzz.py`` (thousands, guided by coverage).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import pickle
import random
import shutil
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.dataset import open_dataset
from trainer.data.preparation.prepare import prepare
from trainer.tasks import get_task

SPLITS = ("train", "valid", "test")
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"drop_bad": "all"}, {"strict": True})
FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "shutil.",
    "import",
    "exec",
    "pty.",
    "pickle.",
    "code.",
    "ftplib",
)
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "ctypes.addressof", "ctypes.string_at")


class Broken(AssertionError):
    """Something that must not happen to a damaged file."""


@dataclass(frozen=True)
class Format:
    """A source of `files` for `task`, of which `target` is damaged; `wrap` makes the file of the damaged bytes."""

    task: str
    files: dict[str, bytes]
    target: str
    wrap: Callable[[bytes], bytes] = bytes
    seeds: tuple[bytes, ...] = ()

    @property
    def honest(self) -> tuple[bytes, ...]:
        """What mutation starts from."""
        return self.seeds or (self.files[self.target],)


def formats() -> dict[str, Format]:
    """Every published layout, and one's own samples."""
    rng = np.random.default_rng(0)
    meld, cherma = get_task("meld").labels, get_task("cherma").labels
    lists = {s: pickle.dumps(_rows(meld, 3, rng), 4) for s in SPLITS}
    chinese = {f"{s}.pkl": pickle.dumps(_rows(cherma, 3, rng), 2) for s in SPLITS}
    whole = {s: _columns(s, 3, rng) for s in SPLITS}
    tables = {f"{s}_sent_emo.csv": _annotations(meld, 4) for s in SPLITS}
    audio = np.ones((4, 3), "f4")
    audio[3] = 0.0  # padding: the lines claim three frames
    arrays = tuple(map(npy, (audio, np.asfortranarray(audio.astype(">f8")), np.ones((2, 3), "?"), np.array([["a"]]))))
    own = {f"{s}.jsonl": _lines(s) for s in SPLITS}
    return {
        "list pickle": Format(
            "meld",
            {f"meld_{s}.pkl": lists[s] for s in SPLITS},
            "meld_train.pkl",
            seeds=tuple(pickle.dumps(_rows(meld, 2, rng), p) for p in (0, 2, 4, 5)),
        ),
        "list pickle, Chinese": Format("cherma", chinese, "test.pkl"),
        "column pickle": Format(
            "mosei",
            {"unaligned_50.pkl": pickle.dumps(whole, 4)},
            "unaligned_50.pkl",
            seeds=tuple(pickle.dumps(whole, p) for p in (1, 3, 4)),
        ),
        "npy": Format("meld", {**own, "a.npy": npy(audio), "a.npz": npz(npy(audio))}, "a.npy", seeds=arrays),
        "npz": Format(
            "meld",
            {**own, "a.npy": npy(audio), "a.npz": npz(npy(audio))},
            "a.npz",
            seeds=(npz(npy(audio)), npz(npy(audio), zipfile.ZIP_DEFLATED), npz(npy(audio), zipfile.ZIP_BZIP2)),
        ),
        "npy in a sound npz": Format(
            "meld", {**own, "a.npy": npy(audio), "a.npz": npz(npy(audio))}, "a.npz", wrap=npz, seeds=arrays
        ),
        "JSON lines": Format("meld", {**own, "a.npy": npy(audio), "a.npz": npz(npy(audio))}, "train.jsonl"),
        "annotations": Format("meld", tables, "train_sent_emo.csv"),
        "annotations with features": Format(
            "meld",
            {**tables, **{f"meld_{s}.pkl": pickle.dumps(_rows(meld, 4, rng), 4) for s in SPLITS}},
            "valid_sent_emo.csv",
        ),
    }


def _rows(labels: Sequence[str], n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(n):
        features: dict[str, Any] = {"text": f"words {i} 你", "audio": rng.random((3, 2), dtype="f4"), "audio_len": 2}
        features |= {"video": rng.random((2, 2)), "video_len": np.int64(i % 3)}
        features["audio"][2:], features["video"][i % 3 :] = 0.0, 0.0
        rows.append({"features": features, "label": labels[i]})
    return rows


def _columns(split: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    columns: dict[str, Any] = {"raw_text": np.array([f"words {i}" for i in range(n)], dtype=object)}
    columns |= {"audio": rng.random((n, 3, 2), dtype="f4"), "vision": rng.random((n, 2, 2)), "audio_lengths": [1, 2, 3]}
    columns["audio"][0, 1:], columns["audio"][1, 2:] = 0.0, 0.0
    columns |= {"id": [f"{split}${i}" for i in range(n)], "regression_labels": np.linspace(-3, 3, n, dtype="f4")}
    return columns


def _annotations(labels: Sequence[str], n: int) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["Sr No.", "Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"])
    writer.writerows([i, f'words {i} 你, "so"', "Ann", labels[i % len(labels)], i // 2, i % 2] for i in range(n))
    return out.getvalue().encode()


def _lines(split: str) -> bytes:
    lines = [
        {"id": f"{split}1", "text": "words", "label": "joy", "audio": "a.npy", "video": "a.npz", "audio_length": 3},
        {"id": f"{split}2", "text": "你 \\ud83d", "label": "anger", "speaker": "Ann", "dialogue": "d", "turn": 2},
        {"id": f"{split}3", "text": "words", "label": 0, "target": 0.5, "rate": {"audio": 2.5}, "colour": None},
    ]
    return "\n".join(map(json.dumps, lines[: 2 if split != "train" else 3])).replace('0, "t', '"fear", "t').encode()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(member: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with the bytes `member` as its one array, checksums and all."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("audio.npy", member)
    return out.getvalue()


def mutate(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four of: bytes changed, removed, put in, repeated; numbers made extreme; parts exchanged."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        at, size = draw.randrange(len(out) + 1), draw.randint(1, 1 << draw.randint(0, 6))
        kind = draw.randrange(7)
        if kind == 0 and at < len(out):
            out[at] = draw.randrange(256)
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = draw.randbytes(size)
        elif kind == 4:
            start = draw.randrange(len(out) + 1)
            out[at:at] = out[start : start + size]
        elif kind == 5:
            extreme = draw.choice((0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
            width = draw.choice((1, 2, 4, 8))
            out[at : at + width] = (extreme & ((1 << 8 * width) - 1)).to_bytes(width, draw.choice(("little", "big")))
        else:
            words = (
                b"nan",
                b"-1",
                b"1e999",
                b"9" * 30,
                b"null",
                b'"',
                b"\n",
                b"\x00",
                b"\xff\xfe",
                b"\\ud800",
                b"[" * 99,
            )
            out[at : at + draw.choice((0, 1, 5))] = draw.choice(words)
    return bytes(out)


class Bench:
    """Prepares one damaged source after the other in `folder`, and checks what must hold; see :meth:`run`."""

    def __init__(self, form: Format, folder: Path) -> None:
        self.form, self.task = form, get_task(form.task)
        self.source, self.out = folder / "source", folder / "out" / "data"
        self.source.mkdir(parents=True)
        self.out.parent.mkdir()
        for name, content in form.files.items():
            (self.source / name).write_bytes(content)

    def run(self, data: bytes) -> str:
        """Prepare the source with `data` as its target: "written" or "refused".

        Raises:
            Broken: a warning, something left behind, or a dataset that was written and cannot be read.
            Exception: whatever else escapes than a ValueError with a message.
        """
        (self.source / self.form.target).write_bytes(self.form.wrap(data))
        options = OPTIONS[zlib.crc32(data) % len(OPTIONS)]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                prepare(self.task, [self.source], self.out, **options)
                end = "written"
            except ValueError as error:
                if type(error) is UnicodeEncodeError or not str(error).strip():
                    raise Broken(f"a refusal that says nothing: {error!r}") from error
                str(error).encode()  # a message that no terminal can show is a fault
                end = "refused"
        if warned:
            raise Broken(f"warnings: {[str(w.message) for w in warned]}")
        if end == "written":
            dataset = open_dataset(self.out, history=2)
            for split in dataset.splits:
                for _ in dataset[split]:
                    pass
            shutil.rmtree(self.out)
        if left := list(self.out.parent.iterdir()):
            raise Broken(f"left behind: {left}")
        return end

    def clear(self) -> None:
        """Remove what a broken case left."""
        for path in self.out.parent.iterdir():
            shutil.rmtree(path)


class Watch:
    """An audit hook that notes what no reading of data has to do: running, importing, connecting, writing elsewhere.

    Python cannot take a hook out again: make one for each process.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._folder: str | None = None
        for encoding in ("cp1252", "cp437", "latin-1", "raw-unicode-escape", "utf-16-le", "utf-8-sig"):
            codecs.lookup(encoding)  # loaded when first used
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        """Note what happens inside the block, writing below `folder` aside."""
        self.seen, self._folder = [], str(folder)
        try:
            yield self.seen
        finally:
            self._folder = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3)
            inside = str(path).startswith(self._folder)
            if writes and not inside and not isinstance(path, int):
                self.seen.append(f"{event} {path} {mode}")
        elif event.startswith(FORBIDDEN) and event not in HARMLESS and not self._cleaning(event, arguments):
            self.seen.append(f"{event} {str(arguments)[:200]}")

    def _cleaning(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Whether files below the folder are made, moved or removed (by `rmtree`, relative to an open folder)."""
        relative = event in ("os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0
        return relative or (event.startswith(("os.", "shutil.")) and str(arguments[0]).startswith(str(self._folder)))
