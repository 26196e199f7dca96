"""``egmf doctor`` on two nodes: what each of them has, and their ranks together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.multinode.lab import Node, environment

pytestmark = [pytest.mark.multinode, pytest.mark.distributed]

PORT = "29557"
Pair = tuple[Node, Node]


def doctor(node: Node, lab: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "doctor", *arguments, "--json"]
    return node.start(command, environment(lab, **env), stderr=subprocess.PIPE)


def checks(out: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_the_nodes_of_a_hostfile_are_asked_and_compared(pair: Pair, lab: Path, work: Path) -> None:
    both, more = work / "hostfile", work / "more"
    more.write_text("node1 slots=1\nnode2 slots=1\nnode9 slots=1\n")
    arguments = (str(work / "toy.yaml"), "--out", str(work / "asked"), "--nodes")
    out, err = doctor(pair[0], lab, *arguments, str(both)).communicate(timeout=500)
    found = checks(out)
    assert [found[name]["state"] for name in ("node1", "node2")] == ["ok", "ok"], err
    assert found["node2"]["values"]["report"]["data"] == found["node1"]["values"]["report"]["data"]
    with pair[1].hide(work / "meld"):
        started = doctor(pair[0], lab, *arguments, str(more))
        out, err = started.communicate(timeout=500)
    assert started.returncode == 1, err
    result = checks(out)["nodes"]
    assert result["state"] == "fault"
    assert "egmf prepare" in result["found"]
    assert "(on node2)" in result["found"]
    assert "node9" in result["found"]
    assert checks(out)["data of meld"]["state"] == "ok"  # it is there on the first
    assert not (work / "asked").exists()


def test_the_ranks_of_two_nodes_are_tried_together(pair: Pair, lab: Path, work: Path) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.81.0.1", "MASTER_PORT": PORT}  # fmt: skip
    ranks = [
        doctor(node, lab, str(work / "toy.yaml"), "--out", str(work / "together"), **common, RANK=str(rank))
        for rank, node in enumerate(pair)
    ]
    output = [rank.communicate(timeout=500) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], output
    found = checks(output[0][0])
    assert found["all-reduce"]["values"]["world"] == 2
    assert found["largest batch"]["state"] == "ok"
    assert output[1][0] == ""
    assert not list(work.glob(".egmf-doctor-*"))
