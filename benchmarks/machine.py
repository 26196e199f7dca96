"""What a figure was measured on and with, for the results of benchmarks; no host name, no paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TypedDict

import psutil


class Machine(TypedDict, total=False):
    """Processor, memory, system and versions; `gpu` and `cuda` where a benchmark used them."""

    processor: str
    cores: int
    memory_gib: float
    system: str
    versions: dict[str, str]
    gpu: str | None
    cuda: str | None


def describe(*packages: str) -> Machine:
    """Processor, memory, system, versions of Python and of `packages`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
