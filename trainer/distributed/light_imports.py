"""Import the libraries of a rank without what they bring along and nobody uses (`docs/performance.md`, "Starts").

DeepSpeed imports MLflow for its autotuner, and it and bitsandbytes hand functions to ``torch.compile``, which imports
TorchInductor with every backend of it; transformers imports SciPy's optimisers for losses of object detection, and
reads the source of all its models twice to list their classes. Python's garbage collector, which would go through the growing
heap of modules again and again, waits until they are there, and leaves them alone from then on.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def import_libraries(*, trains: bool = True) -> None:
    """Import them; after ``quiet_deepspeed`` and before any module that imports one of them. A second call does nothing.

    What does not train, nor shares a model among ranks (`trains` false), needs no DeepSpeed.
    """
    names = {"bitsandbytes", "peft", *(["deepspeed"] if trains else [])}
    if names <= sys.modules.keys():
        return
    with collected_later():
        if trains:
            _import_deepspeed()
        with _compiled_at_first_call():
            import bitsandbytes  # noqa: F401
        _import_transformers()
        with _without_scipy():
            import peft  # noqa: F401


def _import_deepspeed() -> None:
    """With its Muon optimizer, which DeepSpeed imports when an engine is built, to ask whether the optimizer is one."""
    with _without("mlflow"):
        import deepspeed
    if (
        importlib.util.find_spec("deepspeed.runtime.zero.muon") is not None
    ):  # younger than the oldest versions that are allowed
        with _compiled_at_first_call():
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


@contextmanager
def collected_later() -> Iterator[None]:
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


def _import_transformers() -> None:
    """With its list of all models' classes, which it makes for itself and once more for ``transformers.models``, from their source."""
    import transformers
    from transformers.utils import import_utils

    make = import_utils.define_import_structure
    if "transformers.models" in sys.modules or not hasattr(make, "cache_info"):
        return
    prefix = "models."
    made = make(Path(transformers.__file__).parent / "models", prefix=prefix[:-1])  # remembered, with more put in
    own = {
        needs: {name.removeprefix(prefix): classes for name, classes in found.items() if name.startswith(prefix)}
        for needs, found in made.items()
    }
    import_utils.define_import_structure = lambda *args, **options: own  # type: ignore[assignment]
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.define_import_structure = make


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Inside the block transformers, which remembers what is installed, sees no SciPy."""
    from transformers.utils.import_utils import is_scipy_available

    forget = getattr(is_scipy_available, "cache_clear", None)
    if forget is None or "scipy" in sys.modules:
        yield
        return
    forget()
    try:
        with _without("scipy"):
            yield
    finally:
        forget()


@contextmanager
def _compiled_at_first_call() -> Iterator[None]:
    """Inside the block ``torch.compile(function)`` only notes what to compile; the first call of the result compiles it."""
    import torch

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
