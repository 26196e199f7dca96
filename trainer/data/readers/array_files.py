"""Arrays in `.npy` and `.npz` form that nobody has to trust: their headers are read before anything is allocated, and objects never."""

from __future__ import annotations

import contextlib
import io
import lzma
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

MOST_BYTES = 1 << 30  # of the features of one clip, uncompressed
_LONGEST_HEADER = 1 << 16  # bytes; numpy's own are below 200
_DEFLATE = 1100  # what a compressed byte can expand to, at most


class UnreadableArrayError(ValueError):
    """A feature file that does not hold a usable array; the message says why."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever numpy and zipfile raise on a damaged file is a ValueError that says so; their warnings are dropped."""
    damage = (ValueError, EOFError, KeyError, TypeError, OverflowError, SyntaxError, NotImplementedError, RuntimeError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UnreadableArrayError, FileNotFoundError):
        raise
    except (*damage, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError) as error:
        raise UnreadableArrayError(f"is not a readable {what}: {error}") from error


def array_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that begins here; no more is read than a header may be long."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UnreadableArrayError(f"is an array of format {version}")
    size = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > _LONGEST_HEADER:
        raise UnreadableArrayError(f"has a header of {length} bytes; at most {_LONGEST_HEADER} are read")
    text = io.BytesIO(size + file.read(length))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(text)
    return shape, dtype


def check_size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    size = math.prod(shape) * dtype.itemsize
    if size > MOST_BYTES:
        raise UnreadableArrayError(
            f"holds {size / (1 << 30):.1f} GiB (shape {shape}); the features of one clip are at most {MOST_BYTES / (1 << 30):g} GiB: cut it "
            "into clips, or take fewer frames a second"
        )


def check_member(member: Any, info: zipfile.ZipInfo) -> None:
    """Refuse an array in an archive that holds objects or claims more than the archive has."""
    shape, dtype = array_header(member)
    if dtype.hasobject:
        raise UnreadableArrayError("holds Python objects")
    if (
        member.tell() + math.prod(shape) * dtype.itemsize != info.file_size
        or info.file_size > _DEFLATE * info.compress_size
    ):
        raise UnreadableArrayError(f"claims shape {shape} of type {dtype}, which is not the size of what it holds")
    check_size(shape, dtype)
