"""Sweeps: what they make of values and seeds, what they refuse, and real ones that fail, die, stop and continue."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from launch.sweep.grid import expand, parse_seeds, split_values
from launch.sweep.mlflow_parent import ParentRun
from launch.sweep.pool import Budget
from launch.sweep.record import open_record, write_record
from launch.sweep.sweep import Sweep, finished
from tests.distributed.processes import ROOT, egmf, environment, free_port, run, start
from tests.slurm.lab import wait_for
from tests.toy import prepare_toy
from trainer.config import TrackConfig
from trainer.tracking.journal import read_journal

TINY = ROOT / "configs" / "tiny.yaml"
SLOW = {"EGMF_TEST_SLOW": "1", "PYTHONPATH": f"{ROOT}/tests/distributed/failing{os.pathsep}{ROOT}"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with module dropout on toy data."""
    folder = tmp_path_factory.mktemp("sweep")
    prepare_toy("meld", folder)
    path = folder / "toy.yaml"
    path.write_text(
        f"""
extends: {TINY}
task: meld
data: {{path: "{folder}/{{task}}"}}
model:
  backbone: {{tiny: {{vocab_size: 400}}}}
  adapter: {{dropout: 0.1}}
  fusion: {{dropout: 0.1}}
train: {{steps: 4, global_batch: 12, micro_batch: 6, eval_every: 2, save_every: 1, log_every: 1, probe: false}}
eval: {{batch: 6}}
track: {{system_metrics: false, report: false}}
"""
    )
    return path


def test_values_are_cut_at_their_own_commas_only() -> None:
    assert split_values("128,256") == ["128", "256"]
    assert split_values("[local,global],[local]") == ["[local,global]", "[local]"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    assert split_values("{a: [1,2], b: 3},x") == ["{a: [1,2], b: 3}", "x"]


def test_every_combination_is_a_run_with_a_readable_name(tmp_path: Path) -> None:
    values = ["model.fusion.experts=[local,global],[local]", "train.lr.fusion=1e-3,2e-3"]
    variants = expand(TINY, ["train.steps=3"], values)
    assert list(variants) == [
        "experts=local+global,fusion=1e-3", "experts=local+global,fusion=2e-3",
        "experts=local,fusion=1e-3", "experts=local,fusion=2e-3",
    ]  # fmt: skip
    chosen = variants["experts=local,fusion=2e-3"]
    assert (chosen.model.fusion.experts, chosen.train.lr.fusion, chosen.train.steps) == (["local"], 2e-3, 3)
    sweep = Sweep(tmp_path / "it", variants, (3, 4))
    children = sweep.children("parent")
    assert len(children) == len({child.out for child in children}) == 8
    last = children[-1]
    assert (last.name, last.config.train.seed) == ("experts=local,fusion=2e-3-s4", 4)
    assert last.config.track.tags["mlflow.parentRunId"] == "parent"
    assert last.config.track.uri == f"sqlite:///{tmp_path}/mlflow.db"
    plan = sweep.plan()
    assert plan["variants"]["experts=local,fusion=2e-3"] == {"model.fusion.experts": ["local"], "train.lr.fusion": 2e-3}
    assert plan["base"]["train.steps"] == 3
    assert not {"train.seed", "model.fusion.experts", "track.uri"} & plan["base"].keys()
    alone = Sweep(tmp_path, expand(TINY, [], []), (1,)).children()
    assert [child.name for child in alone] == ["s1"]
    same_end = expand(TINY, [], ["train.lr.fusion=1e-3", "model.fusion.width=64", "train.lr.backbone=1e-3,1e-4"])
    assert list(same_end) == ["fusion=1e-3,width=64,backbone=1e-3", "fusion=1e-3,width=64,backbone=1e-4"]
    numbered = expand(TINY, [], ["data.path=" + ",".join("x" * 99 + end for end in "ab")])
    assert list(numbered) == ["v1", "v2"]


def test_all_faults_of_all_combinations_come_at_once(tmp_path: Path) -> None:
    def output(call: Callable[[], object]) -> str:
        with pytest.raises(ValueError) as result:  # noqa: PT011 - the text is looked at
            call()
        return str(result.value)

    several = output(lambda: expand(TINY, [], ["model.fusion.width=64,63", "train.zero=2,7", "task=meldd,meld"]))
    assert several.count("train.zero") == 4
    assert "width=63" in several
    assert "did you mean meld?" in several
    spelled = output(lambda: expand(TINY, ["train.steps=3"], ["width", "train.seed=1,2", "train.steps=3,4", "a=1,,2"]))
    for words in ("--set width", "seeds are named by --seeds", "train.steps: the key is named twice", "--set a=1,,2"):
        assert words in spelled
    assert "are the same run" in output(lambda: expand(TINY, [], ["train.steps=3,3"]))
    assert "are the same run" in output(lambda: expand(TINY, [], ["train.lr.fusion=1e-3,0.001"]))
    for text, words in (("1,1", "twice"), ("1-3", "whole numbers"), ("", "whole numbers")):
        assert words in output(lambda t=text: parse_seeds(t, []))  # type: ignore[misc]
    assert "name the seed twice" in output(lambda: parse_seeds("1", ["train.seed=2"]))


def test_another_plan_in_the_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    one = Sweep(tmp_path, expand(TINY, [], ["model.fusion.width=64,128"]), (1, 2))
    write_record(one, open_record(one))
    key = open_record(one)["key"]
    moved = Sweep(
        tmp_path, expand(TINY, ["data.path=elsewhere", "train.keep=5"], ["model.fusion.width=64,128"]), (1, 2)
    )
    assert open_record(moved)["key"] == key  # what says nothing of the training may change
    other = Sweep(tmp_path, expand(TINY, ["train.steps=9"], ["model.fusion.width=64,256"]), (1, 2, 3))
    with pytest.raises(ValueError, match="holds another sweep") as result:
        open_record(other)
    for words in (
        "seeds: there 1,2, now 1,2,3",
        "width=128, now width=64; width=256",
        "train.steps: there None, now 9",
    ):
        assert words in str(result.value)
    older = json.loads(one.record.read_text())
    del older["base"]["train.clip"]  # as written by a version that had no such key
    one.record.write_text(json.dumps(older))
    assert open_record(one)["key"] == key
    one.record.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_record(one)


def test_runs_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "7")
    budget = Budget(parallel=2, procs=2, cores=16, gpus=("0", "1", "2", "3"))
    assert [budget.environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(2)] == ["0,1", "2,3"]
    assert budget.environment(0)["OMP_NUM_THREADS"] == "4"
    assert "RANK" not in budget.environment(0)
    crowded = Budget(parallel=3, cores=2, gpus=("a", "b"))
    assert [crowded.environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["a", "b", "a"]
    assert crowded.environment(0)["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in Budget(cores=2).environment(0) or "CUDA_VISIBLE_DEVICES" in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert crowded.environment(0)["OMP_NUM_THREADS"] == "5"


def test_a_server_that_is_down_costs_the_parent_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    down = TrackConfig(uri=f"http://127.0.0.1:{free_port()}")
    parent = ParentRun(tmp_path, down, "key", None)
    parent.begin({"a": "b"}, tmp_path / "none.json")
    parent.end("done")
    assert parent.run_id is None
    assert "does not answer: the runs have no parent there" in caplog.text


def values(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything that a run's journal says, but for what depends on time."""
    return {k: v for k, v in read_journal(run / "journal.jsonl").items() if "per_second" not in k}


def assert_same(one: Path, two: Path) -> None:
    """Losses, gate usage, metrics, weights and predictions are equal bit by bit."""
    assert values(one) == values(two)
    for name in ("metrics.json", "checkpoints/step-00000004/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for split in ("valid", "test"):
        tables = [pd.read_parquet(run / "predictions" / f"{split}.parquet") for run in (one, two)]
        pd.testing.assert_frame_equal(*tables)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_worker_that_has_trained_others_trains_as_a_fresh_process_does(toy: Path, tmp_path: Path) -> None:
    """Here after a run with another ZeRO stage. What is finished is not made again."""
    out = tmp_path / "sweep"
    plan = ["sweep", str(toy), "--seeds", "5", "--set", "train.zero=1,2", "--out", str(out)]
    done = egmf(*plan)
    assert done.returncode == 0, done.stderr
    pids = {json.loads(path.read_text())["pid"] for path in out.glob("*/run.json")}
    assert len(pids) == 1, (out / "worker-0.log").read_text()
    fresh = tmp_path / "fresh"
    alone = egmf("train", str(toy), "--out", str(fresh), "train.seed=5")
    assert alone.returncode == 0, alone.stderr
    assert_same(out / "zero=2-s5", fresh)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        tags = dict(store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
        parents = store.execute("select run_uuid from tags where key = 'egmf.kind' and value = 'sweep'").fetchall()
        states = {row[0] for row in store.execute("select status from runs").fetchall()}
    assert len(tags) == 2
    assert {(parent,) for parent in tags.values()} == set(parents)
    assert states == {"FINISHED"}
    before = (out / "zero=2-s5" / "run.json").read_bytes()
    again = egmf(*plan, "--json")
    assert again.returncode == 0, again.stderr
    assert [run["state"] for run in json.loads(again.stdout)["runs"]] == ["done"] * 2
    assert "2 of 2 runs are done already" in again.stderr
    assert (out / "zero=2-s5" / "run.json").read_bytes() == before
    prepare_toy("meld", tmp_path, seed=1)
    other = Sweep(out, expand(toy, [f"data.path={tmp_path}/meld"], ["train.zero=1,2"]), (5,))
    with pytest.raises(ValueError, match="differs in the data of meld") as result:
        finished(other.children())
    assert len(str(result.value).splitlines()) == 2


def state(run: Path) -> str | None:
    try:
        return str(json.loads((run / "run.json").read_text())["state"])
    except FileNotFoundError:
        return None


@pytest.mark.distributed
@pytest.mark.slow
def test_runs_that_fail_die_or_stop_leave_the_others_alone_and_the_same_command_continues(
    toy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    plan = ["sweep", str(toy), "--seeds", "1,2,3,4", "--out", str(out)]
    (out / "s1").mkdir(parents=True)
    (out / "s1" / "checkpoints").write_text("in the way")
    line = [sys.executable, "-m", "trainer", *plan]
    started = start(line, env=environment(**SLOW), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    runs = {seed: out / f"s{seed}" for seed in (1, 2, 3, 4)}

    def saved(seed: int) -> None:
        wait_for(lambda: list(runs[seed].glob("checkpoints/step-*")), 300, lambda: list(out.rglob("*")))

    saved(2)
    os.kill(json.loads((runs[2] / "run.json").read_text())["pid"], signal.SIGKILL)
    saved(3)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=300)[1]
    assert started.returncode == 85, output
    assert [state(run) for run in runs.values()] == [None, "running", "stopped", None]
    assert "s1: failed" in output
    assert "s2: failed" in output
    assert "signal SIGKILL: killed from outside" in output
    assert "s4: begins" not in output
    (out / "s1" / "checkpoints").unlink()
    finished_line = egmf(*plan, "--parallel", "2")
    assert finished_line.returncode == 0, finished_line.stderr
    assert [state(run) for run in runs.values()] == ["done"] * 4
    for seed in (2, 3):
        assert "continuing from" in (runs[seed] / "log.txt").read_text()
    fresh = tmp_path / "fresh"
    assert egmf("train", str(toy), "--out", str(fresh), "train.seed=3").returncode == 0
    assert_same(runs[3], fresh)
    sweep = Sweep(out, expand(toy, [], []), (1, 2, 3, 4))
    assert finished(sweep.children()) == {"s1", "s2", "s3", "s4"}


@pytest.mark.distributed
@pytest.mark.slow
def test_runs_of_several_processes(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    plan = [
        "sweep",
        str(toy),
        "--seeds",
        "1",
        "--set",
        "model.backbone.name=/none,tiny",
        "--procs",
        "2",
        "--out",
        str(out),
    ]
    done = egmf(*plan)
    assert done.returncode == 1, done.stderr
    assert "name=_none-s1: failed" in done.stderr
    assert state(out / "name=tiny-s1") == "done"
    assert json.loads((out / "name=tiny-s1" / "run.json").read_text())["world"] == 2


KEPT = """
import gc, sys
from pathlib import Path
from trainer.distributed.process_group import quiet_deepspeed, start_world
quiet_deepspeed()
from trainer.config import load_config
from trainer.models.egmf import EGMF
from trainer.run.loop import fit
from trainer.distributed.signals import StopRequest
world = start_world()
for stage in (0, 2):
    config = load_config(sys.argv[1], ["train.steps=1", "track.mlflow=false", f"train.zero={stage}"])
    assert fit(config, Path(sys.argv[2]) / str(stage), world, stop=StopRequest()) == 0
    gc.collect()
    assert not [True for thing in gc.get_objects() if type(thing) is EGMF], f"ZeRO-{stage}"
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_leaves_no_model_in_memory(toy: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", KEPT, str(toy), str(tmp_path)]
    done = run(line, env=environment(), cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
