"""The environment of the oldest versions that setup.py allows, made once and kept in .cache/oldest.

Where only torch's CUDA build can be had, it is installed without CUDA's 2 GB of libraries: on a machine without a GPU nothing
of them is called, but torch's own libraries do not load without them. Small stand-ins that the C compiler makes take their place.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from pathlib import Path

from packaging.requirements import Requirement

from tests.distributed.processes import ROOT

CONSTRAINTS = ROOT / "constraints-oldest.txt"
REAL = ("nvidia-cuda-runtime", "nvidia-cuda-cupti")  # small, and called while torch is imported
OF_CUDA = re.compile(r"(cu[A-Zrsf]|nccl|nvrtc|nvtx)")


def pins() -> dict[str, str]:
    """Package -> version, as constraints-oldest.txt has them; names in lower case."""
    lines = [line.partition("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if line)}


def oldest_python() -> Path:
    """The interpreter of the environment; it is made where there is none for these versions yet."""
    made_from = CONSTRAINTS.read_bytes() + Path(__file__).read_bytes() + sys.version.encode()
    base = ROOT / ".cache" / "oldest"
    folder = base / hashlib.sha256(made_from).hexdigest()[:16]
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for other in base.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
            _make(folder)
            (folder / "done").touch()
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    versions = pins()
    torch = f"torch=={versions.pop('torch')}"
    options = os.environ.get("TORCH", "").split()[1:]  # the index that the project's own torch comes from
    first = [f"{name}=={versions.pop(name)}" for name in ("setuptools", "wheel", "packaging")]
    _pip(python, *first, "--upgrade", "pip")
    _pip(python, torch, *options)
    site = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    wanted = [Requirement(text) for text in _distribution(site, "torch").requires or ()]
    libraries = [f"{one.name}{one.specifier}" for one in wanted if one.name.startswith(REAL)]
    if libraries:
        _pip(python, *libraries)
        make_stand_ins(site)
    with tempfile.TemporaryDirectory() as temporary:
        listed = Path(temporary) / "rest.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")
        _pip(python, "--no-build-isolation", "-r", str(listed))


def _distribution(site: Path, name: str) -> importlib.metadata.Distribution:
    (found,) = importlib.metadata.distributions(name=name, path=[str(site)])
    return found


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env={**os.environ, "DS_BUILD_OPS": "0"}
    )
    assert done.returncode == 0, f"pip install {' '.join(arguments)}: {done.stderr[-3000:]}"


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _undefined(library: Path) -> list[tuple[str, str]]:
    """(name, version or "") of the functions that a library takes from others."""
    lines = _output("nm", "-D", "--undefined-only", str(library)).splitlines()
    return [(name, version) for name, _, version in (line.split()[-1].partition("@") for line in lines)]


def make_stand_ins(site: Path) -> None:
    """Libraries with the names and functions of those of CUDA that torch's need and that are not installed; every function fails."""
    folder = site / "torch" / "lib"
    own, there = sorted(folder.glob("lib*.so")), sorted((site / "nvidia").rglob("*.so*"))
    present = {
        line.split()[-1] for one in there for line in _output("nm", "-D", "--defined-only", str(one)).splitlines()
    }
    present = {name.partition("@")[0] for name in present}
    needed: set[str] = set()
    library_of: dict[str, str] = {}  # by a version of its functions
    for one in own:
        needed |= set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nccl|nv)[^]]*)\]", _output("readelf", "-d", str(one))))
        for name, versions in re.findall(r"File: (\S+) .*\n((?:.*Name: .*\n)+)", _output("readelf", "-VW", str(one))):
            library_of |= dict.fromkeys(re.findall(r"Name: (\S+)", versions), name)
    missing = sorted(needed - {one.name for one in there})
    functions: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    for name, version in (pair for one in own for pair in _undefined(one)):
        if library_of.get(version) in functions:
            functions[library_of[version]][version].add(name)
        elif not version and OF_CUDA.match(name) and name not in present:
            functions[missing[0]][""].add(name)  # without a version it may come from anywhere
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary) / "versions"
        for library, versions in functions.items():
            named = [
                f"{version} {{ global: {'; '.join(sorted(names))}; }};"
                for version, names in versions.items()
                if version
            ]
            script.write_text("\n".join(named), encoding="utf-8")
            options = [
                f"-Wl,-soname,{library}",
                "-o",
                str(folder / library),
                *([f"-Wl,--version-script={script}"] * bool(named)),
            ]
            source = "".join(
                f"int {name}(void) {{ return 100; }}\n" for name in sorted(set().union(*versions.values()))
            )
            command = ["cc", "-shared", "-fPIC", "-x", "c", "-", *options]
            subprocess.run(command, input=source, text=True, check=True, capture_output=True)
