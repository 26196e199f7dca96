"""docs/mlflow.md, from top to bottom: every command and every block of Python as it is written there, on a store in an SQLite file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, environment, free_port
from tests.results.seeded import make_two
from tests.serving.mlflow_page import steps
from tests.serving.test_mlflow_model import assert_free, ended, wait_for
from tests.serving.test_promotion import registered
from trainer.tracking.outbox import sync

SAMPLE = {"id": "1", "text": "I told you so.", "task": "meld"}


def lay_out(run: Path, folder: Path) -> None:
    """What the page takes for granted: a recorded run, two groups of registered ones, files of samples."""
    copy = Path(shutil.copytree(run, folder / "runs" / "emotions-s0"))
    sent = sync(copy)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "mlflow": {"uri": sent.uri, "run_id": sent.run_id}}))
    make_two(folder / "runs", (1, 2))
    for made in sorted((folder / "runs").glob("[fl]*-s?")):
        registered(made)
    (folder / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    (folder / "request.json").write_text(json.dumps({"dataframe_records": [SAMPLE]}))


@pytest.mark.slow
def test_every_command_of_the_page(run: Path, tmp_path: Path) -> None:
    lay_out(run, tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = environment(PYTHONPATH=str(ROOT), PATH=path, MLFLOW_DISABLE_TELEMETRY="true", HF_HUB_OFFLINE="1")
    env.pop("MLFLOW_TRACKING_URI", None)
    port = str(free_port())
    output: dict[str, str] = {}
    server = None
    try:
        for step in steps():
            text = step.replace("5001", port)
            words = shlex.split(text) if not text.startswith(("import", "from")) else [sys.executable, "-c", text]
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                env[name] = value
                continue
            if words[:3] == ["mlflow", "models", "serve"]:
                log = tmp_path / "serve.log"
                with log.open("w") as file:
                    server = subprocess.Popen(
                        words, cwd=tmp_path, env=env, stdout=file, stderr=file, start_new_session=True
                    )
                wait_for(f"http://127.0.0.1:{port}/health", server, log)
                continue
            done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{step}\n{done.stderr}"
            output[" ".join(words[:3]) if words[0] != sys.executable else step.splitlines()[0]] = (
                done.stdout + done.stderr
            )
    finally:
        if server is not None:
            with ended(server):
                pass
    assert_free(int(port))
    assert "version 1 of emotions" in output["egmf export runs/emotions-s0"]
    assert "meld@champion is now version" in output["egmf compare runs/full-s1"]
    assert (tmp_path / "from-registry.jsonl").read_text() == (tmp_path / "answers.jsonl").read_text()
    (line,) = [json.loads(text) for text in (tmp_path / "answers.jsonl").read_text().splitlines()]
    served = json.loads(output["curl -sf http://127.0.0.1:5001/invocations".replace("5001", port)])["predictions"][0]
    (from_file,) = json.loads((tmp_path / "response.json").read_text())["predictions"]
    assert served == from_file
    assert (served["id"], served["prediction"], served["answer"]) == ("1", line["prediction"], line["answer"])
    assert f"'prediction': '{line['prediction']}'" in output["import mlflow.pyfunc"]
    printed = output["from trainer import Predictor"]
    assert f"{line['prediction']} {served['probabilities']}" in printed
