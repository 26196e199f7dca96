"""The record of a run: in its journal, and in MLflow whatever happens to the server, the network or the process."""

from __future__ import annotations

import logging
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tests.distributed.processes import ROOT, egmf, environment, free_port, start
from tests.tracking.mlflow_server import MlflowServer, Proxy, assert_same_as_journal, histories
from trainer.config import RunConfig, check_config, dump_config, flatten
from trainer.tracking.journal import read_journal
from trainer.tracking.outbox import source_of_uri, sync, tracking_uri
from trainer.tracking.tracker import Tracker

TOOK = "takes records again"
REFUSED = "does not take the run's records"


def config(**track: object) -> RunConfig:
    return check_config({"task": "meld", "track": {"experiment": "e", "system_metrics": False, **track}})


def started(chosen: RunConfig, out: Path) -> Tracker:
    """A tracker as the loop makes it; the run folder has its config."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(chosen))
    tracker = Tracker(chosen, out, enabled=True)
    tracker.start(chosen, {"world_size": 2})
    return tracker


def tell(tracker: Tracker, first: int, last: int, pause: float = 0.01) -> float:
    """Steps `first` to `last`; returns the longest time that telling one of them took, in seconds."""
    longest = 0.0
    for step in range(first, last + 1):
        began = time.perf_counter()
        tracker.metrics({"train/loss": 1 / step, "train/lr": 0.5 * step, "undefined": None}, step)
        longest = max(longest, time.perf_counter() - began)
        time.sleep(pause)
    return longest


def wait_until_sent(tracker: Tracker, seconds: float = 40) -> None:
    assert tracker._sender is not None
    deadline = time.monotonic() + seconds
    while tracker._sender.outbox.unsent() or tracker._sender._trouble is not None:
        assert time.monotonic() < deadline, "not everything was sent"
        time.sleep(0.1)


def output(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("trainer")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(running: MlflowServer) -> Iterator[Proxy]:
    between = Proxy(running.uri)
    yield between
    between.close()


@pytest.mark.parametrize("kind", ["server", "sqlite"])
def test_a_run_is_recorded_and_continued(kind: str, tmp_path: Path, running: MlflowServer) -> None:
    chosen = config(uri=running.uri if kind == "server" else None, tags={"mine": "yes"})
    out = tmp_path / "run"
    tracker = started(chosen, out)
    tracker.metrics({"train/loss": 2.0, "undefined": None}, 1)
    tracker.artifact(out / "config.yaml")
    tracker.finish("stopped")
    client = mlflow.MlflowClient(tracker.uri)
    run_id = str(tracker.run_id)
    assert client.get_run(run_id).info.status == "KILLED"
    again = started(chosen, out)
    again.metrics({"train/loss": 2.0}, 1)
    again.metrics({"train/loss": 1.0}, 2)
    again.finish("done")
    assert again.run_id == run_id
    if kind == "sqlite":
        assert (tmp_path / "mlflow.db").is_file()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.info.start_time <= run.info.end_time
    assert run.data.params == {key: str(value) for key, value in flatten(chosen).items()}
    assert run.data.tags["mine"] == "yes"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["mlflow.user"]
    assert histories(tracker.uri, run_id) == {"train/loss": [(1, 2.0), (2, 1.0)]}
    assert [a.path for a in client.list_artifacts(run_id)] == ["config.yaml"]


def test_a_server_that_freezes_and_stops_costs_no_step(
    tmp_path: Path, running: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Frozen, it takes requests that it answers too late, and does what they say after it wakes up."""
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        tracker = started(config(uri=running.uri), out)
        tell(tracker, 1, 10)
        wait_until_sent(tracker)
        running.freeze()
        frozen = tell(tracker, 11, 140, pause=0.05)
        running.thaw()
        wait_until_sent(tracker)
        assert [REFUSED in line for line in output(caplog)] == [True, False]
        assert TOOK in output(caplog)[1]
        caplog.clear()
        running.stop()
        stopped = tell(tracker, 141, 200, pause=0.05)
        running.start()
        tell(tracker, 201, 220)
        tracker.finish("done")
    assert [line for line in output(caplog) if REFUSED in line] == output(caplog)[:1]
    assert [line for line in output(caplog) if TOOK in line] == output(caplog)[1:]
    assert "Connection refused" in output(caplog)[0]
    assert_same_as_journal(running.uri, tracker.run_id, out)
    assert len(histories(running.uri, str(tracker.run_id))["train/loss"]) == 220
    assert max(frozen, stopped) < 1  # telling a step: milliseconds, but this machine may be busy


@pytest.mark.slow
def test_a_server_that_is_down_from_the_start(
    tmp_path: Path, running: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    running.stop()
    out = tmp_path / "run"
    chosen = config(uri=running.uri, flush_seconds=2)
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        tracker = started(chosen, out)
        assert time.monotonic() - began < 1
        assert tell(tracker, 1, 300) < 1
        tracker.artifact(out / "config.yaml")
        began = time.monotonic()
        tracker.finish("done")
        assert time.monotonic() - began < 4
    assert tracker.run_id is None
    assert [REFUSED in line for line in output(caplog)] == [True, False]
    assert f"303 records of this run are not in MLflow at {running.uri}" in output(caplog)[1]
    assert output(caplog)[1].endswith(f"egmf track sync {out}")
    absent = egmf("track", "sync", str(out))
    assert absent.returncode == 1
    assert f"{out}: 0 records sent, 303 left" in absent.stderr
    assert "error: MLflow does not take the records" in absent.stderr
    assert "Traceback" not in absent.stderr
    running.start()
    present = egmf("track", "sync", str(out))
    assert present.returncode == 0, present.stderr
    assert f"{out}: 303 records sent, 0 left" in present.stderr
    run_id = present.stderr.split()[-1]
    assert_same_as_journal(running.uri, run_id, out)
    run = mlflow.MlflowClient(running.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["task"] == "meld"
    assert [a.path for a in mlflow.MlflowClient(running.uri).list_artifacts(run_id)] == ["config.yaml"]
    assert sync(out).sent == 0


def test_answers_that_are_lost_leave_nothing_twice(tmp_path: Path, proxy: Proxy, running: MlflowServer) -> None:
    """The creation of the run and every second batch reach the server, and the answers get lost."""
    lost: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if path.endswith("runs/create") and len(lost) < 2:
            lost.append(path)
            return "lose"
        if path.endswith("log-batch"):
            lost.append(path)
            return "lose" if len(lost) % 2 else None
        return None

    proxy.fault = fault
    out = tmp_path / "run"
    chosen = config(uri=proxy.uri, experiment="lost answers")
    for first, last in ((1, 60), (41, 90)):  # continued from step 40
        tracker = started(chosen, out)
        tell(tracker, first, last, pause=0.05)
        tracker.finish("done")
        assert tracker.differences == 0
    assert len(lost) > 6
    proxy.fault = lambda method, path: None
    sync(out)
    assert_same_as_journal(running.uri, tracker.run_id, out)
    client = mlflow.MlflowClient(running.uri)
    experiment = client.get_experiment_by_name("lost answers")
    assert experiment is not None
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [tracker.run_id]


def test_a_store_that_would_keep_doubles_is_asked_first(tmp_path: Path, running: MlflowServer, proxy: Proxy) -> None:
    """What the server took although its answer was lost is not sent again at all."""
    taken = []

    def fault(method: str, path: str) -> str | None:
        if path.endswith("log-batch") and not taken and tracker.run_id and read_journal(out / "journal.jsonl"):
            taken.append(len(proxy.seen))
            return "lose"
        return None

    out = tmp_path / "run"
    chosen = config(uri=proxy.uri)
    tracker = started(chosen, out)
    wait_until_sent(tracker)
    proxy.fault = fault
    tell(tracker, 1, 5)
    wait_until_sent(tracker)
    after = [request for request in proxy.seen[taken[0] + 1 :] if "log-batch" in request]
    assert after == []
    tracker.finish("done")
    assert_same_as_journal(running.uri, tracker.run_id, out)


def test_a_late_second_creation_is_removed(tmp_path: Path, running: MlflowServer, proxy: Proxy) -> None:
    """A creation whose request hung on the way arrives when another one has long been made."""
    chosen = config(uri=proxy.uri, experiment="twins")
    tries = []

    def fault(method: str, path: str) -> str | None:
        if path.endswith("runs/create"):
            tries.append(path)
            return "refuse" if len(tries) == 1 else None
        return None

    proxy.fault = fault
    out = tmp_path / "run"
    tracker = started(chosen, out)
    wait_until_sent(tracker)
    client = mlflow.MlflowClient(running.uri)
    first = client.get_run(str(tracker.run_id))
    twin = client.create_run(first.info.experiment_id, tags={"egmf.journal": first.data.tags["egmf.journal"]})
    tell(tracker, 1, 3)
    tracker.finish("done")
    assert client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(str(tracker.run_id)).info.lifecycle_stage == "active"
    assert_same_as_journal(running.uri, tracker.run_id, out)


@pytest.mark.parametrize("how", ["full disk", "http 500"])
def test_a_server_that_refuses_writes(
    how: str, tmp_path: Path, running: MlflowServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(yes: bool) -> None:
        if how == "full disk":
            running.fill_disk(yes)
        else:
            proxy.fault = (lambda method, path: "refuse") if yes else (lambda method, path: None)

    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        tracker = started(config(uri=proxy.uri), out)
        wait_until_sent(tracker)
        refuse(True)
        try:
            assert tell(tracker, 1, 60, pause=0.06) < 1
        finally:
            refuse(False)
        tell(tracker, 61, 70)
        tracker.finish("done")
    assert [REFUSED in line for line in output(caplog)] == [True, False]
    assert TOOK in output(caplog)[1]
    assert_same_as_journal(running.uri, tracker.run_id, out)


def test_a_slow_server_costs_no_step(tmp_path: Path, running: MlflowServer, proxy: Proxy) -> None:
    proxy.fault = lambda method, path: 0.5
    out = tmp_path / "run"
    tracker = started(config(uri=proxy.uri), out)
    assert tell(tracker, 1, 200) < 0.5
    tracker.finish("done")
    assert_same_as_journal(running.uri, tracker.run_id, out)


def test_a_locked_sqlite_store_costs_no_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    tracker = started(config(), out)
    tell(tracker, 1, 5)
    wait_until_sent(tracker)
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    assert tell(tracker, 6, 70, pause=0.05) < 1
    assert tracker._sender is not None
    assert tracker._sender.outbox.unsent() > 0
    other.rollback()
    other.close()
    tracker.finish("done")
    assert_same_as_journal(tracker.uri, tracker.run_id, out)


TRAINING = """
import sys, time
from pathlib import Path
from tests.tracking.test_tracker import config, started
first, uri, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
tracker = started(config(uri=uri), out)
for step in range(first, 10**9):
    tracker.metrics({"train/loss": 1 / step, "train/samples_per_second": time.perf_counter()}, step)
    print(step, flush=True)
    time.sleep(0.005)
"""


def test_a_killed_run_continues_without_a_step_twice_or_missing(
    tmp_path: Path, running: MlflowServer, proxy: Proxy
) -> None:
    """Killed five times, four of them with requests on the way, and continued from up to 50 steps before."""
    proxy.fault = lambda method, path: 0.3 if "log-batch" in path else None
    out, dice, last = tmp_path / "run", random.Random(0), 0
    for seconds in (None, 0.4, 0.8, 1.2, 1.6):  # after its first step; None: while it starts
        command = [sys.executable, "-c", TRAINING, str(max(1, last - dice.randint(0, 50))), proxy.uri, str(out)]
        process = start(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        reported = "" if seconds is None else process.stdout.readline()
        time.sleep(0.5 if seconds is None else seconds)
        process.kill()
        reported += process.communicate()[0]
        last = max([last, *map(int, reported.split("\n")[:-1])])
    proxy.fault = lambda method, path: None
    result = sync(out)
    assert result.left == 0
    assert_same_as_journal(running.uri, result.run_id, out)
    steps = [step for step, _ in histories(running.uri, str(result.run_id))["train/loss"]]
    assert last > 100
    assert steps == list(range(1, len(steps) + 1))
    assert last <= len(steps) <= last + 1
    assert sync(out).sent == 0


def test_what_the_server_never_takes_does_not_hold_up_the_rest(
    tmp_path: Path, running: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        tracker = started(config(uri=running.uri), out)
        for step in (1, 2, 3):
            tracker.metrics({"good": float(step), "so?bad": 1.0}, step)
        tracker.artifact(out / "config.yaml")
        (out / "gone.txt").write_text("soon gone")
        tracker.artifact(out / "gone.txt")
        (out / "gone.txt").unlink()
        tracker.finish("done")
    assert histories(running.uri, str(tracker.run_id)) == {"good": [(1, 1.0), (2, 2.0), (3, 3.0)]}
    assert len(output(caplog)) == 2
    assert "MLflow does not get the metric so?bad" in output(caplog)[0]
    assert "gone.txt: it is not there" in output(caplog)[1]


def test_a_run_deleted_on_the_server_is_restored_or_another_gets_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A deleted run refuses everything until it is restored; nothing is lost meanwhile."""
    out, chosen = tmp_path / "run", config()
    tracker = started(chosen, out)
    tell(tracker, 1, 3)
    tracker.finish("stopped")
    run_id = str(tracker.run_id)
    client = mlflow.MlflowClient(tracker.uri)
    client.delete_run(run_id)
    again = Tracker(config(flush_seconds=5), out, enabled=True, run_id=run_id)
    tell(again, 4, 6)
    again.finish("done")
    (told,) = [line for line in output(caplog) if REFUSED in line]
    assert f"the run {run_id} was deleted there" in told
    assert f"--run-id {run_id}" in told
    assert f"egmf track sync --new-run {out}" in told
    assert sync(out).left > 0
    client.restore_run(run_id)
    assert sync(out).left == 0
    assert_same_as_journal(tracker.uri, run_id, out)

    client.delete_run(run_id)
    done = egmf("track", "sync", "--new-run", str(out))
    assert done.returncode == 0, done.stderr
    fresh = sync(out)
    assert fresh.run_id not in (None, run_id)
    assert fresh.sent == 0
    assert_same_as_journal(fresh.uri, fresh.run_id, out)


def test_the_config_goes_before_the_variable_and_both_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "one"
    beside = f"sqlite:///{tmp_path}/runs/mlflow.db"
    for variable, named, taken, source in (
        (None, None, beside, "default"),
        ("http://from-the-variable", None, "http://from-the-variable", "MLFLOW_TRACKING_URI"),
        ("http://from-the-variable", "http://named", "http://named", "track.uri"),
        ("", None, beside, "default"),
    ):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if variable is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        track = config(uri=named).track
        assert tracking_uri(track, run) == taken
        assert source_of_uri(track).startswith(source)


def test_a_new_store_gets_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run's database was deleted, or it is sent to another one."""
    out = tmp_path / "run"
    tracker = started(config(), out)
    tell(tracker, 1, 5)
    tracker.finish("done")
    elsewhere = sync(out, uri=f"sqlite:///{tmp_path}/other.db")
    assert elsewhere.run_id != tracker.run_id
    assert "has no run" in caplog.text
    assert_same_as_journal(elsewhere.uri, elsewhere.run_id, out)


def test_a_journal_or_a_note_of_what_was_sent_may_be_lost(tmp_path: Path) -> None:
    """Without the note all is compared with the run that the loop names; another journal gets a run of its own."""
    out, chosen = tmp_path / "run", config()
    tracker = started(chosen, out)
    for step in range(1, 1501):  # several requests
        tracker.metrics({"train/loss": 1 / step, "train/lr": 0.5}, step)
    tracker.finish("stopped")
    before = histories(tracker.uri, str(tracker.run_id))
    (out / "tracking.json").unlink()
    again = Tracker(chosen, out, enabled=True, run_id=tracker.run_id)
    again.finish("stopped")
    assert again.run_id == tracker.run_id
    assert histories(again.uri, str(again.run_id)) == before
    (out / "journal.jsonl").unlink()
    anew = started(chosen, out)
    anew.metrics({"train/loss": 2.0}, 1)
    anew.finish("done")
    assert anew.run_id != tracker.run_id
    assert_same_as_journal(anew.uri, anew.run_id, out)
    assert histories(tracker.uri, str(tracker.run_id)) == before


def test_one_sends_at_a_time(tmp_path: Path, running: MlflowServer) -> None:
    out = tmp_path / "run"
    tracker = started(config(uri=running.uri), out)
    wait_until_sent(tracker)
    with pytest.raises(ValueError, match="is running and sends its records itself"):
        sync(out)
    tracker.finish("done")
    assert sync(out).left == 0


def test_system_metrics_go_through_the_journal(tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = config(system_metrics=True)
    tracker = started(chosen, out)
    time.sleep(1.1)
    tell(tracker, 1, 3)
    tracker.finish("done")
    found = read_journal(out / "journal.jsonl")
    assert [step for step, _ in found["system/cpu_utilization_percentage"]] == [1]
    assert 0 < found["system/system_memory_usage_percentage"][0][1] < 100
    assert_same_as_journal(tracker.uri, tracker.run_id, out)


def test_long_values_are_cut_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = config()
    chosen.deepspeed = {"note": "x" * 9000}
    chosen.track.tags["note"] = "长" * 9000
    with caplog.at_level(logging.WARNING):
        tracker = started(chosen, tmp_path / "run")
        tracker.finish("done")
        again = started(chosen, tmp_path / "run")  # continued
        again.finish("done")
    data = mlflow.MlflowClient(tracker.uri).get_run(str(tracker.run_id)).data
    assert (len(data.params["deepspeed.note"]), data.params["deepspeed.note"][-2:]) == (6000, "x…")
    assert (len(data.tags["note"]), data.tags["note"][-2:]) == (8000, "长…")
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [
        "MLflow gets the beginning of parameter track.tags.note (9000 characters, at most 6000), parameter deepspeed.note (9000 characters, "
        "at most 6000), tag note (9000 characters, at most 8000); config.yaml has all of it"
    ]


def test_other_ranks_record_nothing_and_switched_off_runs_only_the_journal(tmp_path: Path) -> None:
    for tracker in (
        Tracker(config(), tmp_path / "r", enabled=False),
        Tracker(config(mlflow=False, uri=f"http://127.0.0.1:{free_port()}"), tmp_path / "run", enabled=True),
    ):
        assert not tracker.enabled
        tracker.start(config(), {})
        tracker.metrics({"a": 1.0}, 1)
        tracker.artifact(tmp_path)
        tracker.finish("done")
        assert tracker.run_id is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["journal.jsonl"]
