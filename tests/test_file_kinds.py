"""A file that is not what its name says is named, with what to do; one that is, never."""

from __future__ import annotations

import bz2
import gzip
import lzma
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data.readers.raw import ReaderError
from trainer.data.readers.source import open_source
from trainer.file_kinds import misnamed
from trainer.tasks import get_task

PICKLED = pickle.dumps([{"features": {"text": "a"}, "label": "joy"}])
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"


def archive(path: Path, *names: str) -> bytes:
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, b"x")
    return path.read_bytes()


def saved(path: Path, save: object) -> bytes:
    save(path)  # type: ignore[operator]
    return path.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        "nothing but 4,096 zero bytes": b"\0" * 4096,
        "nothing but 3,000,000 zero bytes": b"\0" * 3_000_000,
        "an HTML page": b"\n <!DOCTYPE html><html>Google Drive - Virus scan warning</html>",
        "is an HTML page": b"<HTML><head>",
        "a Git LFS pointer": LFS,
        "compressed with gzip: gunzip it": gzip.compress(PICKLED),
        "compressed with bzip2": bz2.compress(PICKLED),
        "compressed with xz": lzma.compress(PICKLED),
        "compressed with zlib, as joblib": zlib.compress(PICKLED),
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
        "a numpy array": saved(folder / "a.npy", lambda path: np.save(path, np.zeros(3))),
        "a numpy archive": saved(folder / "a.npz", lambda path: np.savez(path, a=np.zeros(3))),
        "a PyTorch file (torch.save)": saved(folder / "a.pt", lambda path: torch.save([1, torch.zeros(2)], path)),
        "a ZIP archive of 2 files": archive(folder / "a.zip", "a.csv", "b.csv"),
        "a damaged ZIP archive": b"PK\x03\x04" + b"?" * 50,
    }


def test_each_kind_is_named_for_every_split_at_once(tmp_path: Path) -> None:
    for number, (what, content) in enumerate(contents(tmp_path).items()):
        folder = tmp_path / f"source{number}"
        folder.mkdir()
        for split in ("train", "valid", "test"):
            (folder / f"meld_{split}.pkl").write_bytes(content)
        with pytest.raises(ReaderError) as caught:
            open_source(get_task("meld"), [folder])
        assert "3 faults" in str(caught.value)
        assert str(caught.value).count(what) == 3, caught.value


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_files(tmp_path: Path, suffix: str) -> None:
    for what, content in (("a Git LFS pointer", LFS), ("an HTML page", b"<html>"), ("gzip", gzip.compress(b"a,b\n"))):
        path = tmp_path / f"train{suffix}"
        path.write_bytes(content)
        with pytest.raises(ReaderError, match=what):
            open_source(get_task("meld"), [path])


@pytest.mark.parametrize("protocol", range(6))
def test_what_is_what_it_says_is_left_alone(tmp_path: Path, protocol: int) -> None:
    for name, content in (
        ("a.pkl", pickle.dumps([np.zeros(9), "<html>"], protocol)),
        ("a.csv", b"Utterance,Speaker\n<html>,a\n"),
        ("a.jsonl", b'{"text": "PK"}\n'),
        ("empty.pkl", b""),
        ("a.h5", b"\x89HDF\r\n\x1a\n"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert misnamed(path) is None
