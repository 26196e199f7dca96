"""Import DeepSpeed and bitsandbytes without what they import and we never use: half of the seconds in which a rank starts.

DeepSpeed imports MLflow for its autotuner, and bitsandbytes hands four fallback functions to ``torch.compile``, which imports
TorchInductor with every backend of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_libraries() -> None:
    """Import both; after ``quiet_deepspeed`` and before any module that imports one of them. A second call does nothing."""
    with _without("mlflow"):
        import deepspeed  # noqa: F401
    with _compile_at_first_call():
        import bitsandbytes  # noqa: F401


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
def _compile_at_first_call() -> Iterator[None]:
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
