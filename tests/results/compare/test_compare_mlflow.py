"""Comparisons of runs in MLflow: an SQLite file, and a real tracking server over HTTP; the same numbers as from folders."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.browser.browser import CHROMIUM, Browser
from tests.distributed import fork_server
from tests.distributed.processes import egmf, environment
from tests.results.seeded import make_seeded, make_two, track
from tests.tracking.mlflow_server import MlflowServer
from trainer.results.compare.comparison import compare
from trainer.results.compare.files import Store, log_comparison, store_for, write_comparison
from trainer.results.compare.sources.find import find_runs
from trainer.saved_config import saved_config

FILES = ("csv", "html", "json", "tex")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    served = MlflowServer(tmp_path_factory.mktemp("server"))
    served.start()
    yield served
    served.stop()


def tracked(folder: Path, uri: str | None = None) -> tuple[Path, dict[str, str]]:
    """Two groups of two seeds, a parent of a sweep's runs, and a run that failed, all in MLflow; run's name -> MLflow id."""
    make_two(folder, (1, 2))
    make_seeded(folder / "broken-s3", 3, state="failed")
    first = track(folder / "full-s1", saved_config(folder / "full-s1"), uri)
    client = MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_run(first).info.experiment_id
    parent = client.create_run(experiment, tags={"egmf.kind": "sweep"}, run_name="sweep").info.run_id
    client.set_terminated(parent)
    ids = {"full-s1": first, "sweep": parent}
    for run in sorted(set(folder.glob("*-s?")) - {folder / "full-s1"}):
        ids[run.name] = track(run, saved_config(run), uri, **{"mlflow.parentRunId": parent})
    return folder, ids


def check_same(folder: Path, ids: dict[str, str], uri: str) -> None:
    """By experiment, by sweep and by run ids, the comparison is that of the folders."""
    by_folder = find_runs([str(folder)], ["test", "valid"])
    expected = compare(by_folder.runs, metrics=["all"])
    found = find_runs(["egmf"], ["test", "valid"], uri)
    assert [note for note in found.notes if "broken-s3" in note and "not finished (failed)" in note]
    got = compare(found.runs, metrics=["all"])
    assert [s.values for s in got.scores] == [s.values for s in expected.scores]
    assert got.differences == expected.differences
    assert got.differing == expected.differing
    assert {run.name: run.fingerprints for g in got.groups for run in g.runs} == {
        run.name: run.fingerprints for g in expected.groups for run in g.runs
    }
    assert [g.speed() for g in got.groups] == [102.0, 102.0]
    assert got.groups[0].devices == ["cpu x 1 threads"]
    assert got.groups[0].runs[0].commit == "0123abc"
    assert {run.name for run in find_runs([ids["sweep"]], ["test"], uri).runs} == {"full-s2", "less-s1", "less-s2"}
    one = find_runs([ids["less-s2"], str(folder / "less-s2")], ["test"], uri)
    assert len(one.runs) == 1
    assert any("counts once" in note for note in one.notes)
    with pytest.raises(ValueError, match="neither a run nor an experiment"):
        find_runs(["egmff"], ["test"], uri)
    with pytest.raises(ValueError, match=r"2 faults[\s\S]*full-s1[\s\S]*train"):
        find_runs([ids["full-s1"], ids["less-s1"]], ["train"], uri)


def check_logged(uri: str, run_id: str, folder: Path) -> None:
    """The comparison is a run of its own, with its files, and no later comparison takes it for a training."""
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status, run.data.tags["egmf.kind"]) == ("compare", "FINISHED", "compare")
    assert sorted(a.path for a in client.list_artifacts(run_id, "compare")) == [f"compare/compare.{k}" for k in FILES]
    path = client.download_artifacts(run_id, "compare/compare.json", str(folder))
    assert len(json.loads(Path(path).read_text())["groups"]) == 2
    assert len(find_runs(["egmf"], ["test"], uri).runs) == 4


def test_the_sqlite_file(tmp_path: Path) -> None:
    folder, ids = tracked(tmp_path / "runs")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    check_same(folder, ids, uri)
    done = egmf("compare", "egmf", "--uri", uri, "--json", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["differences"]) == 1
    assert "broken-s3" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"compare.{kind}" for kind in FILES]
    check_logged(uri, done.stderr.partition(": run ")[2].split()[0], tmp_path)
    again = egmf("compare", str(folder), "--no-log")
    assert again.returncode == 0, again.stderr
    assert "logged to MLflow" not in again.stderr
    check_logged(uri, done.stderr.partition(": run ")[2].split()[0], tmp_path)
    moved = Path(shutil.move(folder / "mlartifacts", tmp_path / "away"))
    with pytest.raises(ValueError, match=r"4 faults[\s\S]*no predictions of test"):
        find_runs(["egmf"], ["test"], uri)
    moved.rename(folder / "mlartifacts")


@pytest.mark.slow  # what the file gives, over HTTP; tests/tracking/test_tracker.py has a server in the quick tests
def test_a_server(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ids = tracked(tmp_path / "runs", server.uri)
    check_same(folder, ids, server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    found = compare(find_runs(["egmf"], ["test"]).runs)
    store = store_for(found, None, [])
    assert store == Store(server.uri, "egmf")
    files = write_comparison(found, tmp_path / "out")
    check_logged(server.uri, log_comparison(found, files, store), tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        find_runs(["egmf"], ["test"], "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be logged"):
        log_comparison(found, files, Store("http://127.0.0.1:9", "egmf"))


def test_copies_of_runs_among_artifacts_are_no_runs_and_neither_are_deleted_runs(tmp_path: Path) -> None:
    folder, ids = tracked(tmp_path / "runs")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    for name, run_id in ids.items():
        if name != "sweep":  # as training logs them
            for file in ("config.yaml", "run.json"):
                client.log_artifact(run_id, str(folder / name / file))
    elsewhere = folder / "0" / ids["less-s1"]
    shutil.copytree(folder / "less-s1", elsewhere / "artifacts")
    found = find_runs([str(folder)], ["test"])
    assert sorted(run.name for run in found.runs) == ["full-s1", "full-s2", "less-s1", "less-s2"]
    assert not [note for note in found.notes if "artifacts" in note or "same run" in note]
    shutil.rmtree(folder / "less-s2")
    assert sorted(run.name for run in find_runs([str(folder)], ["test"]).runs) == ["full-s1", "full-s2", "less-s1"]


def test_no_store_that_a_run_names_is_contacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's run folder and SQLite file; the user's token is in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def egmf(*arguments: str) -> Any:  # in a folder that has no runs of its own
        env = environment(MLFLOW_TRACKING_TOKEN="secret")
        return fork_server.run([sys.executable, "-m", "trainer", *arguments], env=env, cwd=tmp_path, timeout=500)

    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        uri = f"http://127.0.0.1:{trap.getsockname()[1]}"
        make_two(tmp_path / "theirs", (1, 2))
        for path in (tmp_path / "theirs").glob("*/run.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps(record | {"mlflow": {"uri": uri, "run_id": "0" * 31 + "1"}}))
        done = egmf("compare", str(tmp_path / "theirs"))
        assert done.returncode == 0, done.stderr
        assert "--log-to logs the comparison" in " ".join((done.stdout + done.stderr).split())
        MlflowClient(f"sqlite:///{tmp_path}/theirs/mlflow.db").create_experiment("egmf", f"{uri}/artifacts")
        done = egmf("compare", str(tmp_path / "theirs"))
        assert done.returncode == 0, done.stderr
        assert "not beside the store" in done.stderr
        for command in (("show", "full-s1"), ("runs", "."), ("report", "full-s1")):
            shown = egmf(command[0], str(tmp_path / "theirs" / command[1]))
            assert shown.returncode == 0, shown.stderr
        with pytest.raises(TimeoutError):
            trap.accept()


def test_the_store_to_log_to_is_named(server: MlflowServer, tmp_path: Path) -> None:
    make_two(tmp_path / "runs", (1, 2))
    done = egmf("compare", str(tmp_path / "runs"), "--log-to", server.uri)
    assert done.returncode == 0, done.stderr
    run_id = done.stderr.partition(": run ")[2].split()[0]
    logged = MlflowClient(server.uri).list_artifacts(run_id, "compare")
    assert len(logged) == len(FILES)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_mlflow_page_shows_runs_and_comparison(server: MlflowServer, tmp_path: Path) -> None:
    for seed in (1, 2):
        run = make_seeded(tmp_path / f"shown-s{seed}", seed)
        track(run, saved_config(run), server.uri, "looked-at")
    found = compare(find_runs(["looked-at"], ["test"], server.uri).runs)
    run_id = log_comparison(found, write_comparison(found, tmp_path / "out"), Store(server.uri, "looked-at"))
    experiment = MlflowClient(server.uri).get_run(run_id).info.experiment_id
    browser = Browser(tmp_path / "profile")
    try:
        browser.visit(f"{server.uri}/#/experiments/{experiment}/runs")
        wait_for(browser, ["shown-s1", "shown-s2", "compare"])
        browser.visit(f"{server.uri}/#/experiments/{experiment}/runs/{run_id}/artifacts/compare/compare.html")
        wait_for(browser, [f"compare.{kind}" for kind in FILES])
    finally:
        browser.close()


def wait_for(browser: Browser, texts: list[str]) -> None:
    """Until the page shows all of `texts`, up to a minute: it fetches them after it has loaded."""
    condition: Any = " && ".join(f"document.body.innerText.includes('{text}')" for text in texts)
    waiting = f"""new Promise(done => {{ const end = Date.now() + 60000; const look = () =>
      {condition} ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 200); look(); }})"""
    answer = browser.ask("Runtime.evaluate", expression=waiting, awaitPromise=True, returnByValue=True)
    assert answer["result"]["value"], browser.evaluate("document.body.innerText")
