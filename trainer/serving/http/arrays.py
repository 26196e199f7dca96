"""Feature arrays as requests carry them, nested lists or base64 of `.npy` and `.npz` bytes: checked before anything is allocated.

Shapes: T frames, F features of a frame.
"""

from __future__ import annotations

import base64
import binascii
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.readers.array_files import UnreadableArrayError, array_header, check_member, reading

MEMBERS = 8  # arrays in one archive
FORMS = "[[…], …] with a list of numbers for each frame, or an object with npz or npy in base64"
Report = Callable[[str, str], None]  # where in the request, and the reason


@dataclass(frozen=True)
class ArrayLimits:
    """How long and wide an array may be; `hold` is called with the bytes of each before it is made, and may refuse them."""

    frames: int
    width: int
    hold: Callable[[int], None]


def read_array(given: Any, name: str, where: str, limits: ArrayLimits, report: Report) -> np.ndarray | None:
    """The array [T, F] in float32 that a JSON value means; None, with every reason reported, where it is none."""
    if isinstance(given, list):
        return _of_lists(given, where, limits, report)
    if isinstance(given, str):
        report(where, f"is text, and the server opens no file that a request names: give {FORMS}")
        return None
    if not isinstance(given, Mapping):
        report(where, f"is {_kind(given)}: give {FORMS}")
        return None
    known = [key for key in ("npz", "npy") if key in given]
    if len(known) != 1 or len(given) != 1 or not isinstance(given[known[0]], str):
        report(where, f"is an object of other keys than one of npz and npy, with text: give {FORMS}")
        return None
    try:
        content = base64.b64decode(given[known[0]], validate=True)
    except (binascii.Error, ValueError) as error:
        report(f"{where}.{known[0]}", f"is no base64: {error}")
        return None
    read = npz_arrays if known[0] == "npz" else npy_arrays
    return read(content, (name,), f"{where}.{known[0]}", limits, report).get(name)


def npy_arrays(
    content: bytes, names: tuple[str, ...], where: str, limits: ArrayLimits, report: Report
) -> dict[str, np.ndarray]:
    """The array of a `.npy` file under the only name that is asked for; nothing, with the reason reported, where it is none."""
    (name,) = names
    try:
        with reading(".npy array"):
            file = io.BytesIO(content)
            shape, dtype = array_header(file)
            size = _checked(shape, dtype, limits)
            if len(content) - file.tell() != size:
                raise UnreadableArrayError(
                    f"claims shape {shape} of type {dtype}, which is not the size of what it holds"
                )
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        report(where, str(error))
        return {}
    found = _float32(array, where, report)
    return {} if found is None else {name: found}


def npz_arrays(
    content: bytes, names: tuple[str, ...], where: str, limits: ArrayLimits, report: Report
) -> dict[str, np.ndarray]:
    """The arrays of these names in a `.npz` file; where one name is asked for, also its only array. Others are faults.

    What a member holds is read only once its header's shape is allowed and is the size of what the archive claims.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with reading(".npz file"), zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = _members(archive, names)
            for name, info in members.items():
                with archive.open(info) as member:
                    shape, dtype = array_header(member)
                    _checked(shape, dtype, limits)
                with archive.open(info) as member:
                    check_member(member, info)
                with archive.open(info) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                checked = _float32(array, f"{where}.{name}", report)
                if checked is not None:
                    found[name] = checked
    except ValueError as error:
        report(where, str(error))
        return {}
    return found


def _members(archive: zipfile.ZipFile, names: tuple[str, ...]) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MEMBERS:
        raise UnreadableArrayError(f"holds {len(infos)} arrays; at most {MEMBERS} are read")
    stored = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(names) == 1 and len(stored) == 1:
        return {names[0]: infos[0]}
    members = {name: stored[name] for name in names if name in stored}
    if not members or (len(names) > 1 and len(members) < len(stored)):
        held = ", ".join(repr(name[:40]) for name in stored) or "nothing"
        raise UnreadableArrayError(f"holds {held}; arrays called {' and '.join(names)} were expected")
    return members


def _checked(shape: tuple[int, ...], dtype: np.dtype[Any], limits: ArrayLimits) -> int:
    """The bytes of an array that may be read.

    Raises:
        UnreadableArrayError: it may not.
        RefusedError: the server holds too much.
    """
    if dtype.hasobject:
        raise UnreadableArrayError("holds Python objects, which are never read")
    if dtype.kind not in "fiu":
        raise UnreadableArrayError(f"is of type {dtype}: numbers are needed")
    if len(shape) != 2 or min(shape) < 1:  # negative ones would give bytes back
        raise UnreadableArrayError(f"has shape {list(shape)}; [frames, features] is needed, with at least one of each")
    if fault := _too_long(shape[0], shape[1], limits):
        raise UnreadableArrayError(fault)
    limits.hold(shape[0] * shape[1] * (dtype.itemsize + 4))
    return shape[0] * shape[1] * dtype.itemsize


def _too_long(frames: int, width: int, limits: ArrayLimits) -> str:
    if frames > limits.frames:
        return f"has {frames} frames; at most {limits.frames} are taken (--max-frames)"
    return f"has {width} features per frame; at most {limits.width} are taken" if width > limits.width else ""


def _of_lists(rows: list[Any], where: str, limits: ArrayLimits, report: Report) -> np.ndarray | None:
    """The array of nested lists. Types are looked at, since numpy would read "1", true and null as numbers."""
    if not rows:
        report(where, "has no frames: leave it out where there are none")
        return None
    width = len(rows[0]) if isinstance(rows[0], list) else 0
    if fault := _too_long(len(rows), width, limits):
        report(where, fault)
        return None
    good = True
    for t, row in enumerate(rows):
        if not isinstance(row, list):
            report(f"{where}[{t}]", f"is {_kind(row)}: a list of numbers is needed for each frame")
        elif len(row) != width or not row:
            report(f"{where}[{t}]", f"has {len(row)} features" + (f", the first frame {width}" if row else ""))
        elif not set(map(type, row)) <= {float, int}:
            f, value = next((f, value) for f, value in enumerate(row) if type(value) not in (float, int))
            report(f"{where}[{t}][{f}]", f"is {_kind(value)}: a number is needed")
        else:
            continue
        good = False
    if not good:
        return None
    limits.hold(len(rows) * width * 12)
    try:
        array = np.array(rows, dtype=np.float64)
    except OverflowError:
        report(where, "holds a whole number that is larger than a float can hold")
        return None
    return _float32(array, where, report)


def _float32(array: np.ndarray, where: str, report: Report) -> np.ndarray | None:
    with np.errstate(over="ignore"):
        values_TF = np.array(array, dtype=np.float32, order="C")
    finite_TF = np.isfinite(values_TF)
    if finite_TF.all():
        return values_TF
    t, f = np.argwhere(~finite_TF)[0]
    several = f" ({np.count_nonzero(~finite_TF)} such numbers)" if np.count_nonzero(~finite_TF) > 1 else ""
    what = "is larger than float32 can hold" if np.isfinite(array[t, f]) else "is nan or inf"
    report(f"{where}[{t}][{f}]", f"{what}{several}")
    return None


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "text", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
