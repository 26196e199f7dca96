"""The device: loaded before torch, and what watches the operators that run on it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def load(cache: Path) -> None:
    """Build the device with g++ into `cache`, where it is not there yet, and put it under a torch that is not imported yet.

    Raises:
        RuntimeError: torch is imported already, or is not a build for CPUs.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the fake device must be loaded before torch is imported")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise RuntimeError("the fake device is for a torch that was built for CPUs")
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    library = cache / f"device-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{hashlib.sha256(str(id(spec)).encode()).hexdigest()[:8]}")
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            "-w",
            f"-I{torch / 'include'}",
            f"-L{torch / 'lib'}",
            str(SOURCE),
        ]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", str(part)], check=True, timeout=120)
        part.replace(library)
    for name in ("libgomp*.so*", "libc10.so", "libtorch_cpu.so"):
        for path in (torch / "lib").glob(name):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
