"""What the tests of the worker pool run in other processes: importing this costs nothing."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from trainer.features.types import ClipError

built: list[str] = []


def build(name: str) -> None:
    built.append(name)


def cannot_build(what: str) -> None:
    raise {"value": ValueError, "key": KeyError}[what](f"no {what}")


def dies_at_once() -> None:
    os._exit(7)


def square(number: int) -> int:
    return number * number


def pid(_: int) -> int:
    time.sleep(0.2)
    return os.getpid()


def built_here(_: int) -> tuple[int, list[str]]:
    return os.getpid(), built


def misbehave(item: str | int) -> str | int:
    """Do what the item says."""
    if item == "segfault":
        ctypes.string_at(0)
    elif item == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif item == "exit":
        os._exit(5)
    elif item == "sleep":
        time.sleep(60)
    elif item == "spin":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    elif item == "memory":
        block = [bytearray(b"x") * (64 << 20) for _ in range(8)]
        time.sleep(20)
        return len(block)
    elif item == "raise":
        raise KeyError("not this one")
    elif item == "told":
        raise ClipError("unreadable", "it is a text")
    elif item == "unpicklable":
        return lambda: 0  # type: ignore[return-value]
    return item


def note_and_sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)
