"""Runs that hang are ended in time, with the right rank named; healthy ones are left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT, egmf, environment, run
from tests.distributed.watch_worker import CASES
from tests.toy import prepare_toy
from trainer.distributed.rank_snapshots import Frame, RankSnapshot, format_stacks, headline

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of the worker, run at the same time."""
    folder = tmp_path_factory.mktemp("watch")
    command = [sys.executable, "-m", "tests.distributed.watch_worker", str(folder)]
    done = run(command, env=environment(), cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def ended(runs: Path, case: str) -> dict[str, Any]:
    return dict(json.loads((runs / "results.json").read_text())[case])


def output(runs: Path, case: str, name: str) -> str:
    return (runs / case / name).read_text()


HUNG = {
    "sleeps": "rank 1 is not in the collective that rank 0 waits in; rank 1 is at tests/distributed/watch_worker.py",
    "stopped": "rank 1 did not answer",
    "stopped first": "rank 0 did not answer",
    "mismatched": "the ranks wait in different collectives; rank 0 is in all_reduce",
    "other kind": "the ranks wait in different collectives; rank 0 is in all_reduce",
    "native": "rank 1 did not answer",
    "alone": "no rank waits for another; rank 0 is at tests/distributed/watch_worker.py",
}


@pytest.mark.parametrize("case", HUNG)
def test_a_hung_run_ends_on_every_rank_and_names_the_right_one(runs: Path, case: str) -> None:
    frozen = {"stopped": "1", "stopped first": "0", "native": "1"}.get(case)
    codes = {rank: code for rank, (code, _) in ended(runs, case).items()}
    assert codes == {rank: -9 if rank == frozen else 1 for rank in map(str, range(CASES[case]))}  # -9: by the test
    record = json.loads(output(runs, case, "run.json"))
    assert record["state"] == "failed"
    assert HUNG[case] in record["failure"]
    assert HUNG[case] in output(runs, case, "log.txt")
    reporter = 1 if case == "stopped first" else 0
    assert HUNG[case] in output(runs, case, f"stderr{reporter}.txt")
    for rank in map(int, codes):
        if str(rank) != frozen:
            assert HUNG[case] in json.loads(output(runs, case, f"fault{rank}.json"))["message"]["message"]
            assert "the step failed" not in output(runs, case, "log.txt" if rank == 0 else f"log.rank{rank}.txt")


DIFFERS = {
    "sleeps": "rank 1 did not enter collective 6, all_reduce of Float[4]",
    "mismatched": "collective 6 differs: rank 0 entered all_reduce of Float[4], rank 1 entered barrier",
    "other kind": "collective 6 differs: rank 0 entered all_reduce of Float[4], rank 1 entered broadcast of Float[3]",
}


@pytest.mark.parametrize("case", DIFFERS)
def test_the_collective_that_differs_is_named_and_all_are_kept(runs: Path, case: str) -> None:
    failure = json.loads(output(runs, case, "run.json"))["failure"]
    assert failure.endswith(f"process group 0 default_pg: {DIFFERS[case]}")
    for rank in (0, 1):
        entries = json.loads(output(runs, case, f"flight/rank{rank}.json"))["entries"]
        assert {entry["profiling_name"] for entry in entries} >= {"gloo:all_reduce"}


def test_the_report_shows_the_stacks_of_all_ranks(runs: Path) -> None:
    result = output(runs, "sleeps", "log.txt")
    waiting, sleeping = result.split("\nrank 1: in no collective")
    assert "rank 0: in the collective all_reduce; last progress" in waiting
    assert "in all_reduce: work.wait()" in waiting
    assert "step 2" in sleeping
    assert "in load_sample: time.sleep(600)" in sleeping


def test_a_rank_that_holds_pythons_lock_still_leaves_its_stack(runs: Path) -> None:
    assert "in load_sample" in output(runs, "native", "log.rank1.txt")
    assert "did not answer" not in output(runs, "native", "log.rank1.txt")


def test_a_slow_rank_that_moves_is_waited_for(runs: Path) -> None:
    assert {code for code, _ in ended(runs, "slow").values()} == {0}
    assert json.loads(output(runs, "slow", "run.json"))["state"] == "running"
    assert output(runs, "slow", "stderr0.txt") == ""


def place(collective: bool, line: int = 1) -> list[Frame]:
    actual = Frame(file="/home/user/train.py", line=line, function="train", code="step()")
    torch_ = Frame(
        file="/x/site-packages/torch/distributed/distributed_c10d.py", line=9, function="broadcast", code="wait()"
    )
    return [actual, torch_] if collective else [actual]


def rank(number: int, collective: bool, line: int = 1, entered: int = 5) -> RankSnapshot:
    return RankSnapshot(
        rank=number, host=f"node{number}", pid=1, doing="step 3", seconds=60.0,
        threads={"MainThread": place(collective, line)}, entered={"0": entered},
    )  # fmt: skip


def test_who_is_to_blame() -> None:
    def blamed(*ranks: RankSnapshot, silent: tuple[int, ...] = ()) -> str:
        return headline({one.rank: one for one in ranks}, silent, 60.0)

    many = [rank(r, True) for r in range(6)]
    assert "ranks 3, 6-7 did not answer" in blamed(*many[:3], *many[4:], silent=(7, 3, 6))
    assert "rank 4 is not in the collective that ranks 0-3, 5 wait in" in blamed(*many[:4], rank(4, False, 7), many[5])
    assert "all ranks wait in the same collective" in blamed(*many)
    assert "different collectives; ranks 0-4 are in broadcast" in blamed(*many[:5], rank(5, True, 8))
    # on a GPU a rank waits where it needs a result, outside any collective: what it has entered counts
    assert "rank 2 is behind the others" in blamed(rank(0, False), rank(1, False), rank(2, False, entered=4))
    assert "no rank waits for another" in blamed(rank(0, False), rank(1, False))


def test_ranks_at_the_same_place_share_one_stack() -> None:
    result = format_stacks({r: rank(r, r != 2) for r in range(1000)}, [])
    assert result.count("train.py") == 2
    assert "ranks 0-1, 3-999: in the collective broadcast" in result


@pytest.mark.slow  # a whole training that hangs in its fifth step
def test_a_training_that_hangs_is_ended_and_our_launcher_says_why(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path)
    out = tmp_path / "run"
    done = egmf(
        "launch", "local", "--procs", "2", f"{ROOT}/configs/tiny.yaml", "--out", str(out), "task=meld",
        f"data.path={tmp_path}/{{task}}", "train.steps=9", "train.global_batch=8", "train.micro_batch=4",
        "train.stuck_seconds=10", "train.probe=false", "track.mlflow=false", "model.backbone.tiny.vocab_size=400",
        EGMF_TEST_SLEEP_RANK="1", PYTHONPATH=f"{ROOT}/tests/distributed/failing:{ROOT}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert "StuckError: no progress for" in last
    assert "rank 1 is not in the collective that rank 0 waits in" in last
    assert "sitecustomize.py" in last
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == "failed"
    assert "rank 1 is not in the collective" in record["failure"]
    assert "step 5, micro-batch 1 of 1" in (out / "log.txt").read_text()
