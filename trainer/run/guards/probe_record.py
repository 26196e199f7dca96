"""What the probe before the first step has found to fit, so that a run that goes on does not try it again.

``probe.json`` in the run folder holds a hash of all that the probe depends on, and the most memory that a rank had while it ran. It counts
where the hash is the same on every rank and each rank has that memory now; in doubt the probe runs.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.config import RunConfig, flatten
from trainer.distributed.rendezvous import local_size
from trainer.distributed.versions import environment
from trainer.distributed.world import World
from trainer.files import load_json, write_json
from trainer.run.assemble import RunComponents
from trainer.schema import find

RECORD = "probe.json"
LIMIT_FILES = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)  # of the job, in either version of Linux's groups


def once(out: Path, config: RunConfig, parts: RunComponents, world: World, probe: Callable[[], None]) -> bool:
    """Call `probe` on every rank, unless the run folder `out` says that it passed here before; whether it was called.

    With ``train.probe=always`` it is called in any case.
    """
    key = probe_key(config, parts, world)
    found = world.broadcast_object(_read(out) if world.is_rank_zero else None)
    known = found is not None and found["key"] == key and found["memory"] <= _reachable(world)
    if config.train.probe != "always" and all(world.gather_all(known)):
        return False
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    probe()
    most = max(world.gather_all(_most_held(world.device)))
    if world.is_rank_zero:
        write_json(out / RECORD, {"key": key, "memory": most})
    return True


def probe_key(config: RunConfig, parts: RunComponents, world: World) -> str:
    """A hash of settings, data, frozen base, versions, ranks and each rank's machine; the same on every rank."""
    settings = {key: value for key, value in flatten(config).items() if _may_matter(key)}
    own = environment()
    depends = {
        "settings": settings,
        "data": parts.fingerprints,
        "base": parts.model.backbone.fingerprints.source,
        "versions": own["versions"],
        "git": own["git"],
        "machines": world.gather_all(_machine(world.device)),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


def _may_matter(key: str) -> bool:
    place = find(RunConfig, key)
    return place is None or place.affects != "record"


def _machine(device: torch.device) -> dict[str, Any]:
    """A rank's processor, memory with its limits, threads and GPU."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "memory": psutil.virtual_memory().total,
        "limits": [
            *(resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)),
            *(Path(name).read_text().strip() for name in LIMIT_FILES if Path(name).is_file()),
        ],
        "threads": torch.get_num_threads(),
        "gpu": None if gpu is None else [gpu.name, gpu.total_memory],
    }


def _most_held(device: torch.device) -> int:
    """Bytes: the most that this process held of the device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reachable(world: World) -> int:
    """Bytes: what this process holds of the device's memory, and its share of what is free."""
    if world.device.type == "cuda":
        return int(torch.cuda.mem_get_info(world.device)[0] + torch.cuda.memory_reserved(world.device))
    return int(psutil.Process().memory_info().rss + psutil.virtual_memory().available // (local_size() or world.size))


def _read(out: Path) -> dict[str, Any] | None:
    """The record of a run folder; None where there is none, or it is damaged."""
    try:
        found = load_json((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("key"), str) or type(found.get("memory")) is not int:
        return None
    return found
