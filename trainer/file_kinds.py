"""What a file is that cannot be what its name says: told by its first bytes, with what to do."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Collection
from pathlib import Path

_HEAD = 4096
_SUFFIXES = (".pkl", ".pickle", ".csv", ".jsonl")  # of the formats that come with the package; a plug-in knows its own
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ\0": ("xz", "unxz"), b"\x28\xb5\x2f\xfd": ("zstandard", "unzstd"),
}  # fmt: skip
_ZLIB = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)
_FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its arrays to .npy files"),
    (b"%PDF-", "a PDF", "download the file itself"),
    (b"\x93NUMPY", "a numpy array (.npy)", "name it so in JSON lines"),
    (b"PAR1", "a Parquet file", "export it as JSON lines"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
)


def misnamed(path: Path, suffixes: Collection[str] = _SUFFIXES) -> str | None:
    """What the file is where no format with these suffixes is like it, with what to do; None where it may be what its name says.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix.lower() not in suffixes:
        return None
    if not stat.S_ISREG(os.stat(path).st_mode):
        return "is not a regular file: copy what it gives into one"
    with path.open("rb") as file:
        head = file.read(_HEAD)
        zeros = bool(head) and not head.strip(b"\0")
        if zeros and not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b"")):
            return (
                f"is nothing but {path.stat().st_size:,} zero bytes: its download or copy was cut short; fetch it again"
            )
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer and not the file: git lfs pull brings that"
    if _HTML.match(head):
        return "is an HTML page, such as a download's warning or a login: download the file itself"
    for magic, (name, program) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {name}: {program} it"
    for magic, what, advice in _FORMATS:
        if head.startswith(magic):
            return f"is {what}: {advice}"
    if path.suffix in (".pkl", ".pickle"):
        if head.startswith(_ZLIB):
            return "is compressed with zlib, as joblib does: joblib.load it, and pickle.dump what that gives"
        if head.startswith(b"PK\x03\x04"):
            return _archive(path)
    return None


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "is a damaged ZIP archive: fetch it again"
    if any(name.endswith("/data.pkl") for name in names):
        return (
            "is a PyTorch file (torch.save) and no plain pickle: torch.load(path, weights_only=True) it, turn tensors into arrays, "
            "and pickle.dump that"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "is a numpy archive (.npz): name it so in JSON lines"
    return f"is a ZIP archive of {len(names)} files: unpack it"
