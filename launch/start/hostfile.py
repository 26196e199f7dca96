"""Hostfiles, and the plan that comes from one: which ranks start on which node, and where they find rank 0."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.start.local import NodeRanks
from launch.start.ssh import SSH
from trainer.distributed.messages import format_faults

DEFAULT_PORT = 29500  # DeepSpeed's and torchrun's too


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a name that ssh knows, and how many processes run there."""

    name: str
    slots: int


@dataclass(frozen=True)
class LaunchPlan:
    """What is started where."""

    hosts: tuple[Host, ...]
    command: tuple[str, ...]  # of every process
    out: Path
    master_addr: str | None = None  # of rank 0; None: found when the nodes are checked
    master_port: int | None = None

    def ranks(self) -> list[NodeRanks]:
        """Each node's ranks."""
        world_size = sum(host.slots for host in self.hosts)
        firsts = itertools.accumulate((host.slots for host in self.hosts), initial=0)
        rank_zero = (self.master_addr or "", self.master_port or 0)
        return [
            NodeRanks(self.command, first, host.slots, world_size, *rank_zero)
            for first, host in zip(firsts, self.hosts, strict=False)
        ]

    def ranks_of(self, node: int | None) -> NodeRanks:
        """The ranks of one node, for a start without ssh.

        Raises:
            ValueError: the number or the first node's address is missing, or there is no such node.
        """
        faults = []
        if node is None or node >= len(self.hosts):
            faults.append(f"--node-rank is this node's line in the hostfile, 0 to {len(self.hosts) - 1}; given: {node}")
        if self.master_addr is None:
            faults.append("--master-addr is missing: the first node's address that all others reach")
        if faults or node is None:
            raise ValueError(format_faults(faults, "--no-ssh"))
        return replace(self, master_port=self.master_port or DEFAULT_PORT).ranks()[node]

    def describe(self, ranks: Sequence[NodeRanks], env: Mapping[str, str]) -> str:
        """What would be started, for people; of `env`, which travels over ssh, the names."""
        lines = []
        for part in ranks:
            firsts = itertools.accumulate((host.slots for host in self.hosts), initial=0)
            name = self.hosts[list(firsts).index(part.first)].name
            last = part.first + part.count - 1
            numbers = f"rank {part.first}" if part.count == 1 else f"ranks {part.first}-{last}"
            lines.append(f"{name}: {numbers} of {part.world_size}: {shlex.join(part.command)}")
        address = ranks[0].master_addr or f"an address of {self.hosts[0].name}"
        lines.append(f"rank 0 is met at {address}, port {ranks[0].master_port or 'free there'}")
        if env:
            lines.append(f"over {shlex.join(SSH)} NODE, in {os.getcwd()}; environment: {', '.join(sorted(env))}")
        return "\n".join(lines)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """DeepSpeed's format: a line ``name slots=N`` for every node; rank 0 is on the first; # begins a comment.

    Raises:
        ValueError: with every fault of the file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, Host] = {}
    faults = []
    for number, text in enumerate(lines, 1):
        text = text.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([^\s-]\S*)\s+slots=([1-9]\d*)", text)
        if match is None:
            faults.append(f"line {number}: {text!r} is not of the form 'name slots=N' with N of 1 or more")
        elif set("[],;") & set(match[1]):
            faults.append(
                f"line {number}: {match[1]!r} names several nodes: a line for each ('scontrol show hostnames {match[1]}' lists Slurm's)"
            )
        elif match[1] in hosts:
            faults.append(f"line {number}: {match[1]} is listed twice")
        else:
            hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts and not faults:
        faults.append("it lists no node: write a line 'name slots=N' for each")
    if faults:
        raise ValueError(format_faults(faults, f"hostfile {path}"))
    return tuple(hosts.values())
