"""Code of users that extends the package: a module by its dotted name or as a file, or an installed package's entry point."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


class PluginError(ValueError):
    """A plug-in that cannot be imported, or that defines nothing of the kind asked for."""


def load_plugin(reference: str) -> ModuleType:
    """Import a plug-in once in this process: ``my_package.my_module``, or the path of a ``.py`` file.

    Raises:
        PluginError: no such module or file, or one that fails while it is imported.
    """
    try:
        return _load_file(Path(reference)) if reference.endswith(".py") else importlib.import_module(reference)
    except Exception as error:
        raise PluginError(f"plug-in {reference} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """A file's module. Copies of one file, such as those in a run's exported models, are one module: they register the same things."""
    path = path.resolve()
    name = f"egmf_plugin_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def installed_plugins(group: str) -> list[str]:
    """The modules that installed packages announce under the entry point `group`."""
    return sorted({entry.module for entry in entry_points(group=group)})


def subclasses_in(module: ModuleType, base: type[T]) -> list[type[T]]:
    """The concrete subclasses of `base` that `module` itself defines, in the order in which they stand there."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
