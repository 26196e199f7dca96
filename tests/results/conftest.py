"""Run folders that the tests of this folder share; whoever changes one copies it first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.results.made import make_run
from trainer.results.report.report import write_report


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the prepared toy datasets of the made runs lie."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def meld(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("meld") / "meld-run", data, ("meld",))


@pytest.fixture(scope="session")
def unified(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Classification in English and Chinese, and regression, in one run."""
    return make_run(tmp_path_factory.mktemp("unified") / "unified-run", data, ("meld", "cherma", "simsv2"))


@pytest.fixture(scope="session")
def reported(unified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unified run with its report, written over an earlier one. Not to be changed."""
    run = Path(shutil.copytree(unified, tmp_path_factory.mktemp("reported") / unified.name))
    (run / "report").mkdir()
    (run / "report" / "left-over.png").write_bytes(b"old")
    (run / "report.html").write_text("old")
    write_report(run)
    return run


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a run folder to be changed."""

    def make(run: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / run.name))

    return make
