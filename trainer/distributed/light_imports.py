"""Import the libraries of a rank at half the cost: 6 seconds of a core in place of 12 (`docs/performance.md`).

DeepSpeed imports MLflow for its autotuner, and bitsandbytes hands four fallback functions to ``torch.compile``, which imports
TorchInductor with every backend of it: neither is used. Python's garbage collector, which would go through the growing heap of
modules again and again, waits until they are there, and leaves them alone from then on.
"""

from __future__ import annotations

import atexit
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_libraries() -> None:
    """Import them; after ``quiet_deepspeed`` and before any module that imports one of them. A second call does nothing."""
    if {"deepspeed", "bitsandbytes", "peft"} <= sys.modules.keys():
        return
    with _collected_later():
        with _without("mlflow"):
            import deepspeed  # noqa: F401
        with _compiled_at_first_call():
            import bitsandbytes  # noqa: F401
        import peft  # noqa: F401


@contextmanager
def _collected_later() -> Iterator[None]:
    """Inside the block no garbage is collected; what is alive at its end is never looked at again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton's library reports all of it as leaked
    finally:
        if collects:
            gc.enable()


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Inside the block ``import name`` fails, as if it were not installed; unless it is imported already."""
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system documents for this
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


@contextmanager
def _compiled_at_first_call() -> Iterator[None]:
    """Inside the block ``torch.compile(function)`` only notes what to compile; the first call of the result compiles it."""
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
