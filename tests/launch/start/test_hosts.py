"""Hostfiles, the plan of ranks, rank 0's address, and what is refused before anything starts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.start.agent import StartRequest, Verdict
from launch.start.hostfile import Host, LaunchPlan, read_hostfile
from launch.start.hosts import conclude
from launch.start.local import RunState
from launch.start.node_check import master_address, with_rank_zero
from launch.start.nodes import NodeReport
from launch.start.ssh import forwarded_environment
from tests.distributed.processes import ROOT

HOSTS = (Host("a", 4), Host("b", 2), Host("c", 1))


def test_a_hostfile_reads_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text("# nodes\nworker-0 slots=4\n\n  10.0.0.2   slots=2  # two\nuser@far.away slots=16\n")
    reference = fetch_hostfile(str(path))
    assert [(host.name, host.slots) for host in read_hostfile(path)] == list(reference.items())


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(b"\xef\xbb\xbfnode1 slots=2\r\nnode2 slots=2\r\n")
    assert read_hostfile(path) == (Host("node1", 2), Host("node2", 2))


@pytest.mark.parametrize("names", ["node[01-04]", "node1,node2", "n[1,3]"])
def test_a_list_of_nodes_in_one_line_is_refused_with_what_lists_them(tmp_path: Path, names: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(f"{names} slots=8\n")
    with pytest.raises(ValueError, match=f"line 1: .*names several nodes.*scontrol show hostnames {re.escape(names)}"):
        read_hostfile(path)


def test_every_fault_of_a_hostfile_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("a slots=2\nb\nc slots=0\na slots=1\n-oProxyCommand=x slots=1\n")
    with pytest.raises(ValueError, match="4 faults") as result:
        read_hostfile(path)
    for words in ("line 2: 'b'", "line 3: 'c slots=0'", "line 4: a is listed twice", "line 5: '-oProxyCommand"):
        assert words in str(result.value)
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="it lists no node"):
        read_hostfile(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_hostfile(tmp_path / "absent")


def test_every_rank_stands_on_one_node() -> None:
    nodes = LaunchPlan(HOSTS, ("train",), Path("out"), "10.0.0.1", 29500).ranks()
    numbers = [rank for node in nodes for rank in range(node.first, node.first + node.count)]
    assert numbers == list(range(7))
    assert {node.world_size for node in nodes} == {7}
    request = StartRequest(nodes[1], {"HF_HOME": "/data"}, "out")
    assert StartRequest.from_json(request.to_json()) == request


def report(where: str, *addresses: str, reached_at: str | None = None) -> NodeReport:
    by_interface = {f"eth{i}": [address] for i, address in enumerate(addresses)}
    return {"where": where, "addresses": by_interface, "reached_at": reached_at, "free_port": 40001}


@pytest.mark.parametrize(
    ("first", "chosen"),
    [
        (report("a", "172.17.0.1/16", "10.1.0.1/24", reached_at="192.0.2.7"), "192.0.2.7"),
        (report("a", "172.17.0.1/16", "10.1.0.1/24"), "10.1.0.1"),  # docker's address is on both
        (report("a", "172.17.0.1/16"), "172.17.0.1"),
    ],
)
def test_rank_0_is_met_where_the_others_can(first: NodeReport, chosen: str) -> None:
    others = report("b", "172.17.0.1/16", "10.1.0.2/24")
    assert master_address([first, others]) == chosen
    plan = with_rank_zero(LaunchPlan(HOSTS, ("train",), Path("out")), [first, others])
    assert (plan.master_addr, plan.master_port) == (chosen, 40001)


def test_no_address_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="give one with --master-addr"):
        master_address([report("a"), report("b")])


def test_without_ssh_the_place_of_this_node_is_needed() -> None:
    plan = LaunchPlan(HOSTS, ("train",), Path("out"))
    with pytest.raises(ValueError, match="2 faults"):
        plan.ranks_of(3)
    part = LaunchPlan(HOSTS, ("train",), Path("out"), "node-a").ranks_of(1)
    assert (part.first, part.count, part.master_addr, part.master_port) == (4, 2, "node-a", 29500)
    assert plan.describe([part], {}).splitlines() == [
        "b: ranks 4-5 of 7: train",
        "rank 0 is met at node-a, port 29500",
    ]


@pytest.mark.parametrize(
    ("verdicts", "code", "words"),
    [
        ({1: Verdict(255), 0: Verdict(137, "killed")}, 1, "b: the connection was lost"),
        ({0: Verdict(1, "PeerFault", missed_peer=True), 2: Verdict(137, "error on rank 6: killed")}, 137, "node c: error on rank 6"),
        ({0: Verdict(85), 1: Verdict(85), 2: Verdict(85)}, 85, ""),
        ({0: Verdict(0), 1: Verdict(0), 2: Verdict(0)}, 1, "run.json says None and not 'done'"),
    ],
)  # fmt: skip
def test_the_first_cause_is_reported_and_success_needs_a_record_that_is_done(
    verdicts: dict[int, Verdict], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = LaunchPlan(HOSTS, ("train",), tmp_path)
    assert conclude(plan, verdicts, RunState(None, None)) == code
    assert words in capsys.readouterr().err


def test_variables_reach_the_nodes_and_values_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"HF_TOKEN": "secret", "MLFLOW_TRACKING_URI": "http://m", "OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu"}
    for name, value in {**wanted, "CUDA_VISIBLE_DEVICES": "3", "MINE": "x", "RANK": "9"}.items():
        monkeypatch.setenv(name, value)
    variables = forwarded_environment(["MINE"])
    assert wanted.items() <= variables.items()
    assert variables["MINE"] == "x"
    assert not {"CUDA_VISIBLE_DEVICES", "RANK"} & set(variables)
    plan = LaunchPlan(HOSTS, ("train", "my config.yaml"), Path("out"))
    text = plan.describe(plan.ranks(), variables)
    assert "a: ranks 0-3 of 7: train 'my config.yaml'" in text
    assert "c: rank 6 of 7" in text
    assert "HF_TOKEN" in text
    assert "secret" not in text
    with pytest.raises(ValueError, match="--env asks for variables that are not set here: NONE_SUCH"):
        forwarded_environment(["NONE_SUCH"])


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("nowhere.invalid slots=2\n")
    command = [sys.executable, "-m", "trainer", "launch", "hosts", "--hostfile", str(tmp_path / "hostfile")]
    done = subprocess.run(
        [*command, "configs/tiny.yaml", "--out", str(tmp_path / "run"), "--dry-run", "train.zero=3"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nowhere.invalid: ranks 0-1 of 2: " in done.stdout
    assert done.stdout.splitlines()[0].endswith(f"train configs/tiny.yaml --out {tmp_path}/run train.zero=3")
    assert not (tmp_path / "run").exists()
