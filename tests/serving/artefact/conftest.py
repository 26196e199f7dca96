"""Exported folders that the tests of artefacts share; whoever changes one copies it first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.serving.artefact.export import ExportOptions, export_run


@pytest.fixture(scope="session")
def artefact(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of the shared run, with its merged backbone."""
    out = tmp_path_factory.mktemp("artefact") / "exported"
    export_run(run, out, ExportOptions(merge=True))
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder to be changed."""

    def make(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return make
