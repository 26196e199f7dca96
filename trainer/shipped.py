"""The configs, suites and recipes that come with the package, found by name.

A checkout holds them in `configs/` beside the package; a wheel carries the same folder inside it, as `trainer/configs/`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from trainer.schema import nearest


class ShippedConfig(NamedTuple):
    """A config or suite of the package; `description` is the first comment line of its file."""

    name: str
    description: str
    path: Path


def shipped_folder() -> Path:
    """The folder of the shipped configs, whose subfolders `suites` and `recipes` hold the suites and the recipes."""
    package = Path(str(files("trainer")))
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def list_configs() -> list[ShippedConfig]:
    """The configs of runs, by name."""
    return _list(shipped_folder())


def list_suites() -> list[ShippedConfig]:
    """The suites of `egmf reproduce`, by name."""
    return _list(shipped_folder() / "suites")


def list_recipes() -> list[ShippedConfig]:
    """The recipes of feature extraction, by name."""
    return _list(shipped_folder() / "recipes")


def locate_recipe(name: str | Path) -> Path:
    """The file `name`; where there is none, the shipped recipe of that name."""
    path = Path(name)
    shipped = shipped_folder() / "recipes" / f"{name}.yaml"
    return shipped if not path.exists() and path.name == str(name) and shipped.is_file() else path


def locate(name: str | Path, folder: Path = Path()) -> Path:
    """The file `name`, relative to `folder`; where there is none, the shipped config of that name.

    A shipped config is named without folder and suffix: ``meld``. A path that is neither is returned as it is.
    """
    path = folder / name
    if not path.is_file() and Path(name).name == str(name) and not path.suffix:
        shipped = shipped_folder() / f"{name}.yaml"
        if shipped.is_file():
            return shipped
    return path


def _list(folder: Path) -> list[ShippedConfig]:
    return sorted(ShippedConfig(path.stem, _description(path), path) for path in folder.glob("*.yaml"))


def _description(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def nearest_config(path: Path) -> str:
    """What may have been meant by a path that does not exist: a file beside it, or a shipped config."""
    shipped = [config.name for config in list_configs()]
    beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    if not path.suffix:
        return f"{nearest(path.name, shipped)}; 'egmf config list' shows the shipped configs"
    by_name = f"; '{path.stem}' is a shipped config" if path.stem in shipped else ""
    return nearest(path.name, beside) + by_name
