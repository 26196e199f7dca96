"""Experts by name, and the users' own files that register some."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainer.models.fusion.expert import Expert

log = logging.getLogger(__name__)

E = TypeVar("E", bound=type[Expert])
NAME = re.compile(r"[a-z][a-z0-9_]*")  # it is part of names of weights and metrics

_experts: dict[str, type[Expert]] = {}


def register_expert(name: str) -> Callable[[E], E]:
    """Class decorator: `model.fusion.experts` may name this class `name` from now on.

    Raises:
        ValueError: the name is taken by another class, or holds more than lower-case letters, digits and underscores.
    """

    def register(cls: E) -> E:
        if not NAME.fullmatch(name):
            raise ValueError(f"the name of an expert is lower-case letters, digits and underscores, not {name!r}")
        if name in _experts and _experts[name] is not cls:
            raise ValueError(f"two experts are named {name!r}: {_experts[name].__module__} has one already")
        _experts[name] = cls
        return cls

    return register


def registered_experts() -> dict[str, type[Expert]]:
    """Name -> class of all that have been registered so far."""
    return dict(_experts)


def import_plugin(plugin: str) -> None:
    """Import a Python file or an installed module, once in this process.

    Raises:
        ValueError: it is not there, or it fails.
    """
    path = Path(plugin)
    is_file = path.suffix == ".py"
    name = f"egmf_plugin_{path.stem}_{hashlib.sha256(plugin.encode()).hexdigest()[:8]}" if is_file else plugin
    if name in sys.modules:
        return
    if is_file and not path.is_file():
        raise ValueError(
            f"model.fusion.plugins: there is no file {plugin}. Where it has moved, say where: "
            f"model.fusion.plugins=[/new/place/{path.name}]"
        )
    log.warning("model.fusion.plugins: Python code of %s runs in this process", plugin)
    try:
        if not is_file:
            importlib.import_module(plugin)
            return
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs, as an import does
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise ValueError(
            f"model.fusion.plugins: {plugin} cannot be imported: {type(error).__name__}: {error}"
        ) from error
