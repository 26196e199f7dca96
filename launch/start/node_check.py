"""Before a run on several nodes: every node describes itself over ssh, and what differs or is missing is one message."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from launch.start.hostfile import Host, LaunchPlan
from launch.start.nodes import NodeReport
from launch.start.ssh import SSH_FAILED, ssh_command
from trainer.distributed.consistency import differences
from trainer.distributed.messages import format_faults, join_truncated

ANSWER_SECONDS = 120.0  # for a node to describe itself: it imports torch, perhaps over a slow network file system


def check_nodes(hosts: Sequence[Host], config: Path, overrides: Sequence[str], out: Path) -> list[NodeReport]:
    """Every node's own report (:mod:`launch.start.nodes`), asked for in parallel over ssh.

    Raises:
        ValueError: nodes that cannot be reached, differ, lack data, model or run folder, or have fewer GPUs than slots:
            all of them in one message.
    """
    token = f".seen-{secrets.token_hex(8)}"
    command = ["-m", "launch.start.nodes", str(config), "--out", str(out), "--token", token, *overrides]
    mark = out / token
    with contextlib.suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        with ThreadPoolExecutor(max_workers=min(256, len(hosts))) as pool:
            reports = list(pool.map(lambda host: _ask(host, command), hosts))
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    faults = [*differences(reports), *_gpu_faults(hosts, reports), *_folder_faults(out, reports)]
    if faults:
        raise ValueError(format_faults(faults, "the nodes are not ready"))
    return reports


def _gpu_faults(hosts: Sequence[Host], reports: Sequence[NodeReport]) -> list[str]:
    faults = []
    for host, report in zip(hosts, reports, strict=True):
        if report.get("gpus") and len(report["gpus"]) < host.slots:
            faults.append(f"{host.name} has {len(report['gpus'])} GPUs and slots={host.slots} in the hostfile")
    devices = {bool(report["gpus"]): report["where"] for report in reports if "gpus" in report}
    if len(devices) > 1:
        faults.append(f"{devices[True]} has GPUs, {devices[False]} has none")
    return faults


def _folder_faults(out: Path, reports: Sequence[NodeReport]) -> list[str]:
    sees = {report["where"]: report["run_folder"]["sees_token"] for report in reports if "run_folder" in report}
    if all(sees.values()) or not any(sees.values()):
        return []
    blind = join_truncated([name for name, seen in sees.items() if not seen])
    return [f"the run folder {out.resolve()} is not shared: {blind} sees another; choose --out on shared storage"]


def _ask(host: Host, command: Sequence[str]) -> NodeReport:
    """A node's report under its name in the hostfile; what keeps it from answering is its fault."""
    line = ssh_command(host.name, [sys.executable, *command])
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return _unreported(host, f"does not answer within {ANSWER_SECONDS:g} s")
    except OSError as error:
        return _unreported(host, f"cannot be asked: {error}")
    try:
        report: NodeReport = json.loads(done.stdout.splitlines()[-1])
        return {**report, "where": host.name}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        what = "cannot be reached over ssh" if done.returncode == SSH_FAILED else "cannot describe itself"
        return _unreported(host, f"{what}: {last}")


def _unreported(host: Host, fault: str) -> NodeReport:
    return {"where": host.name, "faults": {"node": fault}}


def master_address(reports: Sequence[NodeReport]) -> str:
    """The first node's address that the others can use: where ssh reached it, else one in a network that others have.

    Raises:
        ValueError: it has none.
    """
    first, *others = reports
    reached_at = first["reached_at"]
    if reached_at:
        return reached_at
    own, there = _interfaces([first]), _interfaces(others)
    shared = [a for a in own if any(a.network == b.network and a.ip != b.ip for b in there)]
    chosen = next(iter([*shared, *own]), None)
    if chosen is None:
        raise ValueError(f"{first['where']} has no address but its loopback: give one with --master-addr")
    return str(chosen.ip)


def _interfaces(reports: Sequence[NodeReport]) -> list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    addresses = [text for report in reports for assigned in report["addresses"].values() for text in assigned]
    return [ipaddress.ip_interface(text) for text in addresses]


def with_rank_zero(plan: LaunchPlan, reports: Sequence[NodeReport]) -> LaunchPlan:
    """The plan with rank 0's address and port, from the nodes' reports where they were not given."""
    return replace(
        plan,
        master_addr=plan.master_addr or master_address(reports),
        master_port=plan.master_port or reports[0]["free_port"],
    )
