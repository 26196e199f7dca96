"""What setup.py promises: the tests of models and kernels, and a training of two processes, on the oldest versions of everything."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.distributed.processes import ROOT, environment
from tests.project.oldest import oldest_python, pins
from tests.toy import prepare_toy

TESTED = (  # where the libraries' own behaviour shows
    "tests/models/backbone", "tests/models/fusion/test_network_compiled.py", "tests/models/test_egmf.py",
    "tests/models/test_egmf_packed.py", "tests/models/test_losses.py", "tests/kernels/test_gate.py", "tests/kernels/test_operator.py",
)  # fmt: skip
LONG = (
    "smoothed-and-error",
    "same_texts_give_the_same_files",
    "pickled_weights_are_refused",
    "learns_a_relation",
    "is_not_shrunk",
    "see_a_tree",
)
NOT_HERE = ("mypy", "ruff", "types-PyYAML", "triton")  # no part of a run on a CPU


def requirements() -> list[Requirement]:
    """What setup.py requires, with what its tests need."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    given = {word.arg: word.value for word in call.keywords}
    texts = [*ast.literal_eval(given["install_requires"]), *ast.literal_eval(given["extras_require"])["dev"]]
    return [one for one in map(Requirement, texts) if one.name not in NOT_HERE]


def test_the_oldest_versions_are_the_floors_of_setup() -> None:
    oldest = pins()
    wrong = {}
    for one in requirements():
        (floor,) = [Version(part.version) for part in one.specifier if part.operator == ">="]
        pinned = oldest.get(one.name.lower())
        if pinned is None or Version(pinned) != floor:
            wrong[one.name] = f"setup.py allows {floor}, constraints-oldest.txt has {pinned}"
    assert not wrong
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if version and name.lower() in {one.name.lower() for one in requirements()}:
            assert Version(version) >= Version(oldest[name.lower()]), line


@pytest.fixture(scope="module")
def python() -> Path:
    return oldest_python()


def run(python: Path, *arguments: str, cwd: Path, timeout: float) -> str:
    env = environment(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="")
    for name in [name for name in env if name.startswith(("PYTEST_", "EGMF_TEST_"))]:
        del env[name]  # of the tests around these
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [str(python), "-m", *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_train_on_the_oldest_versions(python: Path, tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path)
    words = (
        "task=meld", f"data.path={tmp_path}/{{task}}", "train.steps=4", "train.global_batch=8", "train.micro_batch=4",
        "model.backbone.tiny.vocab_size=400", "model.fusion.width=16", "train.zero=2", "model.backbone.quantization=nf4",
    )  # fmt: skip
    config = str(ROOT / "configs" / "tiny.yaml")
    run(python, "trainer", "launch", "local", "--procs", "2", config, "--out", "run", *words, cwd=tmp_path, timeout=400)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["state"] == "done"
    oldest = pins()
    versions = record["versions"]
    for name in ("transformers", "peft", "deepspeed", "bitsandbytes", "datasets", "mlflow", "numpy"):
        assert versions[name] == oldest[name]
    assert versions["torch"].partition("+")[0] == oldest["torch"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_models_and_kernels_on_the_oldest_versions(python: Path, tmp_path: Path) -> None:
    chosen = f"not ({' or '.join(LONG)})"
    line = ("pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", chosen, *TESTED)
    output = run(python, *line, f"--basetemp={tmp_path / 'base'}", cwd=ROOT, timeout=1200)
    assert " passed" in output
    assert " failed" not in output
