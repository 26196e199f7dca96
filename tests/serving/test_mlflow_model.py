"""A run as an MLflow model, with a real tracking server: logged, registered, loaded, served over HTTP and by Spark; the same answers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from tests.distributed.processes import egmf, environment, free_port
from tests.serving.mlflow_page import block
from tests.tracking.mlflow_server import MlflowServer, Proxy, histories
from trainer.cli import app
from trainer.data.dataset import open_dataset
from trainer.serving.artefact.export import export_run
from trainer.serving.mlflow_model.registry import Registered, log_model
from trainer.serving.mlflow_model.requirements import TRAINING
from trainer.serving.mlflow_model.schema import OUTPUT
from trainer.serving.predictor import Predictor
from trainer.tracking.journal import read_journal
from trainer.tracking.outbox import sync

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    served = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    served.start()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def tracked(run: Path, server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run that is recorded in MLflow."""
    copy = Path(shutil.copytree(run, tmp_path_factory.mktemp("tracked") / "emotions-s0"))
    sent = sync(copy, server.uri)
    assert (sent.left, sent.trouble) == (0, None)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "mlflow": {"uri": server.uri, "run_id": sent.run_id}}))
    return copy


@pytest.fixture(scope="module")
def artefact(tracked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "emotions"
    export_run(tracked, out)
    return out


@pytest.fixture(scope="module")
def registered(tracked: Path, artefact: Path) -> Registered:
    return log_model(tracked, artefact, "emotions")


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.load(run)


def samples(run: Path) -> list[dict[str, Any]]:
    """The test splits of both tasks, with arrays as nested lists."""
    found = []
    for name in ("meld", "simsv2"):
        for sample in open_dataset(run.parent / name)["test"]:
            row: dict[str, Any] = {"id": sample.id, "text": sample.text, "task": name}
            row |= {"speaker": sample.speaker, "dialogue": sample.dialogue, "turn": sample.turn}
            for stream in ("audio", "video"):
                values = getattr(sample, f"{stream}_TF")
                if values is not None:
                    row[stream] = values.astype(float).tolist()
            found.append({key: value for key, value in row.items() if value is not None})
    return found


def check_same(
    rows: list[dict[str, Any]], predictor: Predictor, given: list[dict[str, Any]], within: float = 0.0
) -> None:
    """Rows of the MLflow model are the answers of the predictor, bit by bit in the same batches."""
    expected = predictor.predict(given)
    assert [(row["task"], row["id"]) for row in rows] == [(one.task, one.id) for one in expected]
    for row, one in zip(rows, expected, strict=True):
        assert (row["valid"], row["answer"], row["fault"]) == (one.valid, one.answer, None)
        if within and isinstance(one.prediction, float):
            assert float(row["prediction"]) == pytest.approx(one.prediction, abs=within)
        else:
            assert row["prediction"] == str(one.prediction)
        assert row["probabilities"] == pytest.approx(one.probabilities, rel=0, abs=within)


@pytest.fixture
def store(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> Registered:
    """The registered version, with its store as that of MLflow in this process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.uri)
    return registered


@pytest.fixture(scope="module")
def loaded(registered: Registered) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", registered.uri)
        return mlflow.pyfunc.load_model(registered.address)


def elsewhere(folder: Path, uri: str) -> dict[str, str]:
    """The environment of a process that finds neither this repository nor another store."""
    env = environment(MLFLOW_TRACKING_URI=uri, MLFLOW_DISABLE_TELEMETRY="true", HF_HUB_OFFLINE="1", HOME=str(folder))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # MLflow starts uvicorn by its name
    return {key: value for key, value in env.items() if key != "PYTHONPATH"}


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """The process, which is a group of its own, is gone after the block with all that it started."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def test_loaded_in_python(loaded: Any, predictor: Predictor, run: Path) -> None:
    given = samples(run)
    table = loaded.predict(pd.DataFrame(given))
    assert list(table.columns) == list(OUTPUT)
    check_same(table.to_dict("records"), predictor, given)


def test_arrays_and_the_task_as_a_parameter(loaded: Any, predictor: Predictor, run: Path) -> None:
    given = [row for row in samples(run) if row["task"] == "simsv2"]
    nameless = pd.DataFrame([{k: v for k, v in row.items() if k != "task"} for row in given])
    for stream in ("audio", "video"):  # as Spark and pandas hold them: an array of arrays, or one of numbers
        nameless[stream] = [
            None
            if not isinstance(value, list)
            else np.array([*map(np.array, value), None], dtype=object)[:-1]
            if i % 2
            else np.array(value)
            for i, value in enumerate(nameless[stream])
        ]
    table = loaded.predict(nameless, params={"task": "simsv2"})
    check_same(table.to_dict("records"), predictor, given)


def test_faulty_samples_refuse_the_call_or_are_reported(loaded: Any, predictor: Predictor, run: Path) -> None:
    good = [row for row in samples(run) if row["task"] == "meld"]
    wide = {"id": "wide", "text": "x", "task": "meld", "audio": [[0.5] * 3]}
    lost = {"id": "lost", "text": "x", "task": "nothing"}
    given = pd.DataFrame([good[0], wide, good[1], lost])
    with pytest.raises(
        MlflowException,
        match=r"2 of 4 samples[\s\S]*samples\[1\][\s\S]*samples\[3\][\s\S]*'nothing'[\s\S]*faulty='report'",
    ):
        loaded.predict(given)
    rows = loaded.predict(given, params={"faulty": "report"}).to_dict("records")
    assert [row["id"] for row in rows] == [good[0]["id"], "wide", good[1]["id"], "lost"]
    assert [bool(row["fault"]) for row in rows] == [False, True, False, True]
    assert (rows[3]["prediction"], rows[3]["valid"], rows[3]["probabilities"]) == (None, False, {})
    check_same([rows[0], rows[2]], predictor, good[:2])
    for rate in (5, True, [1, 2], "x"):
        [row] = loaded.predict(
            pd.DataFrame([{**good[0], "id": "r", "rate": rate}]), params={"faulty": "report"}
        ).to_dict("records")
        assert (row["id"], row["valid"]) == ("r", False)
        assert row["fault"].startswith("rate: ")
    with pytest.raises(MlflowException, match="refuse or report, not 'perhaps'"):
        loaded.predict(given, params={"faulty": "perhaps"})
    with pytest.raises(MlflowException, match="'mel' is none of the model's"):
        loaded.predict(given[:1], params={"task": "mel"})


def test_files_are_read_only_where_whoever_loads_the_model_allows_it(
    loaded: Any, store: Registered, predictor: Predictor, run: Path, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    given = [row for row in samples(run) if row["task"] == "meld" and "audio" in row][:3]
    for row in given:
        np.save(inside / f"{row['id']}.npy", np.array(row["audio"]))
    named = [{**row, "audio": f"{row['id']}.npy"} for row in given]
    with pytest.raises(MlflowException, match=r"3 of 3[\s\S]*audio: names a file, and this model reads none"):
        loaded.predict(pd.DataFrame(named))
    allowed = mlflow.pyfunc.load_model(store.address, model_config={"files": str(inside)})
    check_same(allowed.predict(pd.DataFrame(named)).to_dict("records"), predictor, given)
    np.save(tmp_path / "secret.npy", np.array(given[0]["audio"]))
    (inside / "link.npy").symlink_to(tmp_path / "secret.npy")
    for path in ("../secret.npy", str(tmp_path / "secret.npy"), "link.npy"):
        with pytest.raises(MlflowException, match="does not lie in the folder"):
            allowed.predict(pd.DataFrame([{**given[0], "audio": path}]))


def test_what_is_logged(store: Registered, tracked: Path, tmp_path: Path) -> None:
    """Code, artefact, pinned packages, signature, example; no pickle; the example answers; and the run itself is as it was."""
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=store.address, dst_path=str(tmp_path)))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "requirements.txt", "input_example.json", "pyfunc.py", "code/trainer/tasks.py"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pyc"))]
    lines = (folder / "requirements.txt").read_text().split()
    assert f"mlflow=={importlib.metadata.version('mlflow')}" in lines
    assert f"torch=={importlib.metadata.version('torch').partition('+')[0]}" in lines
    assert all("==" in line for line in lines)
    assert not [line for line in lines if line.startswith(("cloudpickle", "egmf", "deepspeed"))]
    loaded = mlflow.pyfunc.load_model(str(folder))
    example = loaded.predict(loaded.input_example)
    assert list(example["task"]) == ["meld", "simsv2"]
    assert all(example["valid"])


def test_the_version_and_its_run(store: Registered, tracked: Path) -> None:
    client = MlflowClient(store.uri)
    version = client.get_model_version("emotions", store.version)
    record, metrics = (json.loads((tracked / name).read_text()) for name in ("run.json", "metrics.json"))
    assert version.run_id == store.run_id == record["mlflow"]["run_id"]
    assert version.status == "READY"
    assert version.tags["egmf.run"] == "emotions-s0"
    assert (version.tags["egmf.seed"], version.tags["egmf.step"]) == (
        str(record["seed"]),
        metrics["checkpoint"].lstrip("step-0"),
    )
    assert version.tags["git.commit"].startswith(record["git"]["commit"])
    for task, fingerprint in record["data"].items():
        assert version.tags[f"data.{task}"] == fingerprint
    assert float(version.tags["valid/meld/wf1"]) == metrics["valid"]["meld"]["wf1"]
    assert float(version.tags["test/simsv2/mae"]) == metrics["test"]["simsv2"]["mae"]
    model = client.get_logged_model(store.model_id)
    assert str(model.status) == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "emotions", "version": version.version}]
    assert model.source_run_id == store.run_id
    entity = client.get_run(store.run_id)
    assert [one.model_id for one in entity.outputs.model_outputs] == [store.model_id]
    shown = {one.key: one.value for one in model.metrics}
    assert shown["valid/meld/wf1"] == metrics["valid"]["meld"]["wf1"]
    assert entity.info.status == "FINISHED"
    assert histories(store.uri, store.run_id) == read_journal(tracked / "journal.jsonl")


def test_another_registration_is_another_version_and_leaves_the_run_alone(
    store: Registered, tracked: Path, artefact: Path
) -> None:
    client = MlflowClient(store.uri)
    before = client.get_run(store.run_id).info
    said: list[str] = []
    second = log_model(tracked, artefact, "emotions", requirement="egmf-trainer==0.1", report=said.append)
    assert int(second.version) > int(store.version)
    assert f"version {second.version} of emotions" in said[0]
    after = client.get_run(store.run_id).info
    assert (after.start_time, after.end_time, after.status) == (before.start_time, before.end_time, before.status)
    assert histories(store.uri, store.run_id) == read_journal(tracked / "journal.jsonl")
    text = mlflow.artifacts.load_text(f"{client.get_logged_model(second.model_id).artifact_location}/requirements.txt")
    assert "egmf-trainer==0.1" in text.split()


def test_opened_by_its_address(store: Registered, predictor: Predictor, run: Path, tmp_path: Path) -> None:
    given = samples(run)[:6]
    expected = predictor.predict(given)
    client = MlflowClient(store.uri)
    client.set_registered_model_alias("emotions", "champion", store.version)
    left = set(Path(tempfile.gettempdir()).glob("egmf-mlflow-*"))
    for address in (store.address, "models:/emotions@champion", f"models:/{store.model_id}"):
        assert Predictor.load(address).predict(given) == expected
    assert set(Path(tempfile.gettempdir()).glob("egmf-mlflow-*")) <= left
    for address, why in {
        "models:/emotions/99": "cannot be read from MLflow",
        "models:/emotions@nobody": "cannot be read from MLflow",
        "models:/emotions": "write models:/NAME/VERSION",
        "models:/emotions/Production": "write models:/NAME/VERSION",
        "models:emotions/1": "write models:/NAME/VERSION",
    }.items():
        with pytest.raises(ValueError, match=why):
            Predictor.load(address)


def test_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no MLflow store: set MLFLOW_TRACKING_URI"):
        Predictor.load("models:/emotions/1")
    assert not list(tmp_path.iterdir())


def test_served_over_http(store: Registered, predictor: Predictor, run: Path, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "files").mkdir()
    files = {"MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps({"files": str(tmp_path / "files")})}
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", store.address, "--host", "127.0.0.1", "--port", str(port),
        "--env-manager", "local",
    ]  # fmt: skip
    log = (tmp_path / "log.txt").open("w")
    address = f"http://127.0.0.1:{port}"
    with (
        log,
        ended(
            subprocess.Popen(
                command,
                env=elsewhere(tmp_path, store.uri) | files,
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ) as process,
    ):
        wait_for(f"{address}/health", process, tmp_path / "log.txt")
        given = samples(run)
        status, answer = post(f"{address}/invocations", {"dataframe_records": given})
        assert status == 200, answer
        check_same(answer["predictions"], predictor, given)
        columns = ["id", "text", "task"]
        split = {"columns": columns, "data": [[row[name] for name in columns] for row in given[:3]]}
        status, answer = post(f"{address}/invocations", {"dataframe_split": split})
        check_same(answer["predictions"], predictor, [{name: row[name] for name in columns} for row in given[:3]])
        voiced = next(row for row in given if row["task"] == "meld" and "audio" in row)
        np.save(tmp_path / "files" / "voice.npy", np.array(voiced["audio"]))
        status, answer = post(f"{address}/invocations", {"dataframe_records": [{**voiced, "audio": "voice.npy"}]})
        assert status == 200, answer
        check_same(answer["predictions"], predictor, [voiced])
        status, answer = post(f"{address}/invocations", {"dataframe_records": [{**voiced, "audio": "/etc/passwd"}]})
        assert status == 400
        assert "does not lie in the folder" in answer["message"]
        body = {"dataframe_records": [{"id": "a", "text": "x", "task": "none"}], "params": {"faulty": "report"}}
        status, answer = post(f"{address}/invocations", body)
        assert status == 200
        assert "'none' is none of the run's" in answer["predictions"][0]["fault"]
    assert_free(port)


def test_in_a_fresh_process_with_the_code_that_travels(
    store: Registered, predictor: Predictor, run: Path, tmp_path: Path
) -> None:
    """`mlflow.models.predict`, where nothing of this repository is on the path."""
    given = samples(run)[:5]
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_records": given}))
    code = (
        "import sys, mlflow.models\n"
        f"mlflow.models.predict({store.address!r}, input_path='in.json', output_path='out.json', env_manager='local')\n"
        f"print(sorted({set(TRAINING)} & set(sys.modules)))\n"
        "print(sys.modules['trainer'].__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=elsewhere(tmp_path, store.uri),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    unpinned, code_of = done.stdout.strip().splitlines()[-2:]
    assert unpinned == "[]"  # what the requirements leave out is not imported
    assert code_of.endswith("/code/trainer/__init__.py")
    check_same(json.loads((tmp_path / "out.json").read_text())["predictions"], predictor, given)


@pytest.mark.slow
def test_a_batch_of_spark(store: Registered, predictor: Predictor, run: Path, tmp_path: Path) -> None:
    """Two local workers answer a table of Spark by the model as a function."""
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    given = samples(run)
    (tmp_path / "in.json").write_text(json.dumps(given))
    assert store.address == "models:/emotions/1"  # as in the page
    (tmp_path / "block.py").write_text(block("spark"))
    # away from the folder beside it that is called as a module of Python, http
    job = shutil.copy(Path(__file__).parent / "spark_job.py", tmp_path)
    command = [sys.executable, str(job), "block.py", "in.json", "out.json"]
    env = elsewhere(tmp_path, store.uri) | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    log = tmp_path / "log.txt"
    with (
        log.open("w") as file,
        ended(
            subprocess.Popen(command, env=env, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True)
        ) as process,
    ):
        assert process.wait(timeout=400) == 0, log.read_text()[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["partitions"] == 2
    by_id = {(row["task"], row["id"]): row for row in found["rows"]}
    check_same([by_id[row["task"], row["id"]] for row in given], predictor, given, within=1e-5)


def test_a_run_that_was_never_recorded(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "egmf")
    with pytest.raises(ValueError, match=r"never recorded in MLflow[\s\S]*egmf track sync"):
        log_model(run, tmp_path / "egmf", "emotions")


def test_a_run_whose_journal_was_sent_later(
    server: MlflowServer, tracked: Path, artefact: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tracked, tmp_path / tracked.name))
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "mlflow": None}))
    made = log_model(copy, artefact, "later", uri=server.uri, requirement="egmf-trainer")
    assert made.run_id == record["mlflow"]["run_id"]


def test_runs_that_the_store_does_not_have(server: MlflowServer, tracked: Path, artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tracked, tmp_path / tracked.name))
    record = json.loads((copy / "run.json").read_text())
    gone = {"uri": server.uri, "run_id": "0" * 32}
    (copy / "run.json").write_text(json.dumps({**record, "mlflow": gone}))
    with pytest.raises(ValueError, match="has no run 0000"):
        log_model(copy, artefact, "emotions")
    client = MlflowClient(server.uri)
    deleted = client.create_run(client.get_experiment_by_name("egmf").experiment_id).info.run_id
    client.delete_run(deleted)
    (copy / "run.json").write_text(json.dumps({**record, "mlflow": {"uri": server.uri, "run_id": deleted}}))
    with pytest.raises(ValueError, match="is deleted at"):
        log_model(copy, artefact, "emotions")
    nowhere = {"uri": f"http://127.0.0.1:{free_port()}", "run_id": "0" * 32}
    (copy / "run.json").write_text(json.dumps({**record, "mlflow": nowhere}))
    with pytest.raises(ValueError, match="does not take the model"):
        log_model(copy, artefact, "emotions")


def test_artefacts_that_are_not_the_run_s(tracked: Path, artefact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tracked, tmp_path / "another-run"))
    with pytest.raises(ValueError, match="was exported from emotions-s0, step-00000003, and the run is another-run"):
        log_model(other, artefact, "emotions")
    older = Path(shutil.copytree(tracked, tmp_path / tracked.name))
    metrics = json.loads((older / "metrics.json").read_text())
    (older / "metrics.json").write_text(json.dumps({**metrics, "checkpoint": "step-00000002"}))
    with pytest.raises(ValueError, match="the run is emotions-s0, step-00000002: export it anew"):
        log_model(older, artefact, "emotions")
    damaged = Path(shutil.copytree(artefact, tmp_path / "damaged"))
    with (damaged / "fusion.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=r"fusion\.safetensors"):
        log_model(tracked, damaged, "emotions")


def test_the_command(tracked: Path, server: MlflowServer, tmp_path: Path) -> None:
    for words, why in {
        (): "where does the model go",
        ("--uri", server.uri, "--out", str(tmp_path / "out")): "are of --mlflow NAME",
        ("--mlflow", "a/b"): "cannot name a registered model",
        ("--mlflow", "merged", "--merge"): "a registry keeps the adapter alone",
    }.items():
        result = CliRunner().invoke(app, ["export", str(tracked), *words])
        assert isinstance(result.exception, ValueError)
        assert why in str(result.exception)
    left = set(Path(tempfile.gettempdir()).glob("egmf-*"))
    done = egmf("export", str(tracked), "--mlflow", "by-command", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["mlflow"]["name"], found["mlflow"]["version"]) == ("by-command", "1")
    assert "path" not in found
    version = MlflowClient(server.uri).get_model_version("by-command", "1")
    assert version.tags["egmf.artefact"] == found["hash"]
    assert set(Path(tempfile.gettempdir()).glob("egmf-*")) <= left


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a@b", "it's"])
def test_names_that_mlflow_cannot_have(name: str, run: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a registered model"):
        log_model(run, run, name)


def test_a_store_that_fails_half_way_keeps_nothing(server: MlflowServer, tracked: Path, artefact: Path) -> None:
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("egmf").experiment_id
    before = {model.model_id for model in client.search_logged_models([experiment])}
    for place in ("model-versions/create", "mlflow-artifacts"):
        proxy = Proxy(server.uri)
        proxy.fault = lambda method, path, place=place: (
            "refuse" if place in path and method in ("POST", "PUT") else None
        )
        try:
            with pytest.raises(ValueError, match="does not take the model"):
                log_model(tracked, artefact, "half", uri=proxy.uri, requirement="egmf-trainer")
        finally:
            proxy.close()
    assert {model.model_id for model in client.search_logged_models([experiment])} == before
    assert not client.search_model_versions("name = 'half'")


def wait_for(url: str, process: subprocess.Popen[Any], log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def post(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def assert_free(port: int, seconds: float = 10) -> None:
    """Nothing listens at the port, soon after what did was killed."""
    end = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        assert time.monotonic() < end
        time.sleep(0.1)
