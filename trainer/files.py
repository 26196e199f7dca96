"""Small files: written whole or not at all, and YAML read safely and fast."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml


def plain(value: str) -> str:
    """A value as a part of a folder's name."""
    inner = value.strip("[]{}()'\" ")
    return re.sub(r"[^\w.+-]", "_", "+".join(part.strip(" '\"") for part in inner.split(",")))


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def load_yaml(text: str) -> object:
    """What ``yaml.safe_load`` gives (plain values alone), by libyaml where PyYAML has it: seven times as fast.

    Raises:
        yaml.YAMLError: `text` is not YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        value: object = loader.get_single_data()
        return value
    finally:
        loader.dispose()


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears at `path` when the block ends well; a block that fails leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
