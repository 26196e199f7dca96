"""Rendezvous of ranks on two nodes, and the errors where it fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.multinode.lab import Node, environment, inner

pytestmark = [pytest.mark.multinode, pytest.mark.distributed]

PORT = "29555"
Pair = tuple[Node, Node]


def meet(pair: Pair, lab: Path, *changes: dict[str, str], seconds: float = 60) -> list[str]:
    """The output of one rank on each node; `changes` go over their environments, `{"absent": ""}` starts none."""
    base = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.81.0.1",
        "MASTER_PORT": PORT,
    }
    command = [sys.executable, "-m", "tests.multinode.meeting", str(seconds)]
    started = [
        node.start(command, environment(lab, **{**base, "RANK": str(rank), **change}))
        for rank, (node, change) in enumerate(zip(pair, changes, strict=True))
        if "absent" not in change
    ]
    return [process.communicate(timeout=240)[0] for process in started]


@pytest.mark.parametrize("master", ["10.81.0.1", "node1"])
def test_the_interface_that_leads_to_the_others_is_found(pair: Pair, lab: Path, master: str) -> None:
    """On node1 its own name resolves to 127.0.1.1, and docker0 has the same address on both nodes."""
    result = meet(pair, lab, {"MASTER_ADDR": master}, {"MASTER_ADDR": master})
    for rank, text in enumerate(result):
        assert f"MET rank {rank} of 2 on node{rank + 1} by eth0, sum 2" in text
        listening = text.split("LISTENS ")[1].split()
        own = {f"10.81.0.{rank + 1}"} | ({"::"} if rank == 0 and master == "node1" else set())
        assert {place.rpartition(":")[0] for place in listening} == own
        assert (f"10.81.0.1:{PORT}" in listening) == (rank == 0 and master != "node1")


def test_ranks_with_different_secrets_do_not_meet(pair: Pair, lab: Path) -> None:
    first, second = meet(pair, lab, {"EGMF_SECRET": "a" * 64}, {"EGMF_SECRET": "b" * 64}, seconds=10)
    assert "REFUSED " in first
    assert "is not from a process of this run: it is not signed with the run's secret" in first
    assert "'here/verdict' at 10.81.0.1:29555 is not from a process of this run" in second or "'egmf/" in second


def test_a_loopback_master_is_refused_on_every_node(pair: Pair, lab: Path) -> None:
    result = meet(pair, lab, *[{"MASTER_ADDR": "127.0.0.1"}] * 2)
    for number, text in enumerate(result, 1):
        assert "REFUSED MASTER_ADDR=127.0.0.1 is every machine's own address, and this run has several nodes" in text
        assert f"node{number} has lo (127.0.0.1), eth0 (10.81.0.{number})" in text


def test_interfaces_that_cannot_work_are_refused(pair: Pair, lab: Path) -> None:
    absent, loopback = meet(pair, lab, {"GLOO_SOCKET_IFNAME": "eth7"}, {"GLOO_SOCKET_IFNAME": "lo"}, seconds=5)
    assert (
        "REFUSED GLOO_SOCKET_IFNAME=eth7: node1 has no interface eth7 that is up; it has lo (127.0.0.1), eth0" in absent
    )
    assert "REFUSED GLOO_SOCKET_IFNAME=lo: lo is the loopback of node2, which no other node reaches" in loopback


def test_an_unreachable_interface_is_an_error_on_every_rank(pair: Pair, lab: Path) -> None:
    for text in meet(pair, lab, *[{"GLOO_SOCKET_IFNAME": "docker0"}] * 2):
        assert "rank 0 on node1 (172.30.0.1) cannot reach node2 at 172.30.0.1: " in text
        assert "rank 1 on node2 (172.30.0.1) cannot reach node1 at 172.30.0.1: " in text
        assert "unset GLOO_SOCKET_IFNAME" in text


def test_an_absent_rank_is_in_the_message(pair: Pair, lab: Path) -> None:
    (text,) = meet(pair, lab, {}, {"absent": ""}, seconds=4)
    assert "REFUSED rank 1 of 2 did not come in time; the others are on node1" in text
    (text,) = meet(pair, lab, {"absent": ""}, {}, seconds=4)
    assert f"REFUSED rank 1 on node2 cannot reach rank 0 at 10.81.0.1:{PORT} within 4 s: Connection refused" in text


def test_a_port_in_use_is_an_error_with_the_process_that_uses_it(pair: Pair, lab: Path) -> None:
    server = pair[0].start([sys.executable, "-m", "http.server", PORT], environment(lab))
    try:
        pid = inner(server)
        until = time.monotonic() + 60
        while not pair[0].left_behind().get("ports"):
            assert time.monotonic() < until
            time.sleep(0.1)
        first, second = meet(pair, lab, {}, {}, seconds=10)
        assert f"REFUSED port {PORT} of node1 is in use by process" in first
        assert "(python" in first
        assert "the port belongs to another program" in second
    finally:
        os.kill(pid, 9)
        server.wait()


def test_another_version_on_one_node_is_an_error_on_every_rank(pair: Pair, lab: Path) -> None:
    import importlib.metadata

    version = importlib.metadata.version("peft")
    folder = next(path for path in importlib.metadata.files("peft") or () if path.name == "METADATA").locate()
    text = Path(str(folder)).read_text()
    with pair[1].replace(Path(str(folder)), text.replace(f"\nVersion: {version}\n", "\nVersion: 0.0.7\n")):
        for result in meet(pair, lab, {}, {}):
            assert f"peft differs: {version} on rank 0 on node1; 0.0.7 on rank 1 on node2" in result
