"""Small files: written whole or not at all, and YAML read safely and fast."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

DEEPEST = 100  # levels of a YAML text
READ = 1 << 22  # bytes at once
LARGEST = 1_000_000  # values of one, each alias counted as what it stands for


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


def load_json(text: str | bytes) -> Any:
    """What ``json.loads`` gives; a text that is nested too deep for it is no JSON either.

    Raises:
        ValueError: `text` is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        raise ValueError("it has a number of thousands of digits") from error


def load_yaml(text: str) -> object:
    """What ``yaml.safe_load`` gives (plain values alone), by libyaml where PyYAML has it: seven times as fast.

    Raises:
        yaml.YAMLError: `text` is not YAML, or not such as :func:`check_nesting` takes: libyaml would exhaust the stack.
    """
    check_nesting(text)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        value: object = loader.get_single_data()
        return value
    finally:
        loader.dispose()


def check_nesting(text: str) -> None:
    """Refuse YAML that is nested deeper than :data:`DEEPEST`, or that aliases make larger than :data:`LARGEST` values.

    Events are counted, which needs neither stack nor memory, and only where the text has the signs for it.

    Raises:
        yaml.YAMLError: it is.
    """
    flow = text.count("[") + text.count("{")
    block = max((len(line) - len(line.lstrip(" -?:\t")) for line in text.splitlines()), default=0)
    if flow + block <= DEEPEST and not ("&" in text and "*" in text):
        return
    open_collections: list[tuple[str | None, int]] = []  # the anchor of each, and how many values there were before it
    sizes: dict[str, int] = {}
    values = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_collections.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_collections}:
                raise yaml.YAMLError(f"&{event.anchor} holds itself")
            values += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
        if len(open_collections) > DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels")
        if values > LARGEST:
            raise yaml.YAMLError(f"its aliases make it larger than {LARGEST} values")


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(READ):
            digest.update(block)
    return digest.hexdigest()


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
