"""The wheel, installed outside the checkout: shipped configs by name, templates, a training, the doctor.

Its environment is a new one that borrows the libraries of this one: a line of a .pth file puts their folder on the path, and
the editable install, which is a .pth file inside that folder, is not followed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns

import pytest

from tests.distributed.processes import ROOT, environment
from tests.project.test_surroundings import copied
from tests.toy import prepare_toy
from trainer import __version__
from trainer.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
FOLDERS = ("trainer", "launch", "configs")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
SMALL = (
    "train.steps=2", "train.global_batch=8", "train.micro_batch=4", "train.probe=false",
    "model.backbone.tiny.vocab_size=400", "model.fusion.width=16", "track.mlflow=false",
)  # fmt: skip


def run(*command: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    env = environment()
    del env["PYTHONPATH"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def build(source: Path, folder: Path) -> Path:
    run(*PIP, "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is packaged, without what an earlier build may have left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in FILES:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in FOLDERS:
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    python = str(folder / "bin" / "python")
    run(python, *PIP[1:], "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel), cwd=folder)
    where = run(python, "-c", "import trainer, launch; print(trainer.__file__, launch.__file__)", cwd=folder).stdout
    assert [Path(place).parent for place in where.split()] == [own / "trainer", own / "launch"]
    return folder / "bin"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.path={prepare_toy('meld', tmp_path_factory.mktemp('data'))}"


def test_the_wheel_holds_every_package_file_and_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = message_from_string(archive.read(f"egmf_trainer-{__version__}.dist-info/METADATA").decode("utf-8"))
    expected = {
        f"{name}/{path.relative_to(ROOT / name)}" for name in ("trainer", "launch") for path in files(ROOT / name)
    }
    expected |= {f"trainer/configs/{path.relative_to(ROOT / 'configs')}" for path in files(ROOT / "configs")}
    assert {name for name in names if ".dist-info/" not in name} == expected - {"launch/setup_env.sh"}
    assert f"egmf_trainer-{__version__}.dist-info/licenses/LICENSE" in names
    assert {"trainer/py.typed", "launch/py.typed"} <= names
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_source_distribution_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(
        sys.executable,
        "-c",
        f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})",
        cwd=source,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert "configs/suites/paper.yaml" in {name.partition("/")[2] for name in archive.getnames()}
    again = build(sdist, tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()


def test_what_the_images_copy_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    for name in copied():
        (copytree if (source / name).is_dir() else copyfile)(source / name, tmp_path / name)
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(build(tmp_path, tmp_path / "wheel")) as second:
        assert first.namelist() == second.namelist()


def test_shipped_configs_go_by_name(installed: Path, tmp_path: Path) -> None:
    egmf = str(installed / "egmf")
    assert run(egmf, "--version", cwd=tmp_path).stdout == f"egmf-trainer {__version__}\n"
    listed = json.loads(run(egmf, "config", "list", "--json", cwd=tmp_path).stdout)
    assert {one["name"] for one in listed["configs"]} == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {one["name"] for one in listed["suites"]} == {path.stem for path in (ROOT / "configs/suites").glob("*.yaml")}
    assert all(Path(one["path"]).is_relative_to(installed.parent) for one in listed["configs"])
    (tmp_path / "shown.yaml").write_text(run(egmf, "config", "show", "meld", cwd=tmp_path).stdout, encoding="utf-8")
    assert load_config(tmp_path / "shown.yaml") == load_config(ROOT / "configs" / "meld.yaml")
    assert "did you mean meld?" in run(egmf, "config", "show", "mled", cwd=tmp_path, code=1).stderr
    suite = run(egmf, "reproduce", "--suite", "diagnostic", "--dry-run", cwd=tmp_path)
    assert "15 runs (5 variants, 3 seeds)" in suite.stderr


def test_templates_are_there_and_runs_start(installed: Path, tmp_path: Path, data: str) -> None:
    egmf = str(installed / "egmf")
    script = run(egmf, "launch", "slurm", "demo", "--procs-per-node", "2", "--dry-run", cwd=tmp_path).stdout
    assert script.startswith("#!")
    assert str(installed / "python") in script
    run(egmf, "train", "tiny", "task=meld", data, *SMALL, cwd=tmp_path)
    out = tmp_path / "runs" / "tiny-s0"
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["state"] == "done"
    assert "</html>" in (out / "report.html").read_text(encoding="utf-8")


def test_a_sweeps_workers_start(installed: Path, tmp_path: Path, data: str) -> None:
    run(str(installed / "egmf"), "sweep", "tiny", "task=meld", data, *SMALL, "--seeds", "3", cwd=tmp_path)
    assert (tmp_path / "runs" / "tiny-sweep" / "s3" / "metrics.json").is_file()


def test_the_doctor_examines_a_shipped_config(installed: Path, tmp_path: Path, data: str) -> None:
    found = run(str(installed / "egmf"), "doctor", "tiny", "task=meld", data, *SMALL, "--json", cwd=tmp_path)
    report = json.loads(found.stdout)
    assert report["faults"] == 0
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["config"] == "ok"
    assert states["largest batch"] == "ok"
