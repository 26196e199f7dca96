"""What a node brings to a run: ``python -m launch.start.nodes CONFIG [--out RUN] [overrides]`` prints it as one JSON object.

The object is a :class:`NodeReport`. A config that cannot be read there is a fault in it.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import psutil

from launch.units import GIB
from trainer.config import RunConfig, load_config
from trainer.distributed import consistency


class RunFolder(TypedDict):
    """How the run folder looks from a node; `sees_token` is None where no token was asked for."""

    free_gib: float
    sees_token: bool | None


class NodeReport(consistency.Report, total=False):
    """What :func:`trainer.distributed.consistency.report` says of a node, and its machine.

    A node that could not be asked has `where` and `faults` alone.
    """

    addresses: dict[str, list[str]]  # interface -> its IPv4 addresses with their networks
    reached_at: str | None  # the address that the ssh connection came in at
    free_port: int
    cpus: int
    memory_gib: float
    gpus: list[str]  # names
    run_folder: RunFolder


def report(config: RunConfig) -> NodeReport:
    """This node: what it would run with, and its machine."""
    return {**consistency.report(config), **machine()}


def machine() -> NodeReport:
    """Addresses, a free port, processors, memory and GPUs."""
    return {
        "where": socket.gethostname(),
        "addresses": addresses(),
        "reached_at": _reached_at(),
        "free_port": _free_port(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": _gpus(),
    }


def addresses() -> dict[str, list[str]]:
    """Interface -> its IPv4 addresses with their networks (10.0.0.1/24), of those that are up and lead out of this machine."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {
        name: [
            ipaddress.ip_interface(f"{a.address}/{a.netmask}").with_prefixlen
            for a in assigned
            if a.family == socket.AF_INET and not a.address.startswith("127.")
        ]
        for name, assigned in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def _reached_at() -> str | None:
    parts = os.environ.get("SSH_CONNECTION", "").split()
    return parts[2] if len(parts) == 4 and not parts[2].startswith("127.") else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _run_folder(out: Path, token: str | None) -> RunFolder:
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    seen = None if token is None else consistency.wait_until((out / token).exists, 2.0)
    return {"free_gib": round(shutil.disk_usage(place).free / GIB, 1), "sees_token": seen}


def main(arguments: Sequence[str]) -> None:
    """Print the report of this node."""
    parser = argparse.ArgumentParser(prog="python -m launch.start.nodes")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--token")
    given = parser.parse_intermixed_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        found = machine()
        try:
            found = report(load_config(given.config, given.overrides))
        except ValueError as error:
            found["faults"] = {"config": str(error)}
        if given.out is not None:
            found["run_folder"] = _run_folder(given.out, given.token)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
