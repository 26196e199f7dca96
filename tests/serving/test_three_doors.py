"""README's commands from a trained run to Python, HTTP and MLflow, as they are written there: one model, one answer."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, environment, free_port
from tests.serving.test_mlflow_model import assert_free, ended, wait_for

pytestmark = pytest.mark.slow
SERVERS = {"egmf serve": (8000, "readyz"), "mlflow models": (5001, "health")}
SHORT = (
    "train.steps=4", "train.eval_every=null", "train.global_batch=32", "track.report=false", "train.probe=false",
)  # fmt: skip


def steps() -> list[str]:
    """Commands and the block of Python of the section, from top to bottom."""
    whole = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Out of the run folder")[2]
    section = whole.partition("\n## ")[0]
    found = [(match.start(), match[1]) for match in re.finditer(r"```python\n(.*?)```", section, re.DOTALL)]
    found += [
        (match.start(), match[1]) for match in re.finditer(r"^    ((?:egmf|mlflow|export|curl) .*)$", section, re.M)
    ]
    return [text for _, text in sorted(found)]


def command(words: list[str], folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_python_http_and_mlflow_give_the_same_answer(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = environment(PYTHONPATH=str(ROOT), PATH=path, MLFLOW_DISABLE_TELEMETRY="true", HF_HUB_OFFLINE="1")
    env.pop("MLFLOW_TRACKING_URI", None)
    sizes = [word for split, n in (("train", 96), ("valid", 24), ("test", 24)) for word in ("--size", f"{split}={n}")]
    command(["egmf", "prepare", "diagnostic", "--out", "data", *sizes], tmp_path, env)
    command(["egmf", "train", "demo-single", "data.path=data", "--out", "runs/demo", *SHORT], tmp_path, env)
    ports = {str(old): str(free_port()) for old, _ in SERVERS.values()}
    said: dict[str, str] = {}
    with ExitStack() as stack:
        for step in steps():
            text = step
            for old, new in ports.items():
                text = text.replace(f":{old}/", f":{new}/").replace(f"--port {old}", f"--port {new}")
            words = [sys.executable, "-c", text] if text.startswith("from") else shlex.split(text)
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                env[name] = value
            elif (server := " ".join(words[:2])) in SERVERS:
                old, ready = SERVERS[server]
                port = ports[str(old)]
                words += ["--port", port] if "--port" not in words else []
                log = tmp_path / f"{words[0]}.log"
                with log.open("w") as file:
                    process = subprocess.Popen(
                        words, cwd=tmp_path, env=env, stdout=file, stderr=file, start_new_session=True
                    )
                stack.enter_context(ended(process))
                wait_for(f"http://127.0.0.1:{port}/{ready}", process, log)
            else:
                said[text] = command(words, tmp_path, env)
    for port in ports.values():
        assert_free(int(port))
    python, http, mlflow = (said[text] for text in said if text.startswith(("from", "curl")))
    prediction, _, probabilities = python.partition(" ")
    doors: list[tuple[str, dict[str, float]]] = [(prediction, ast.literal_eval(probabilities))]
    for answered in (json.loads(http), json.loads(mlflow)):
        [one] = answered["predictions"]
        assert one["id"] == "1"
        doors.append((one["prediction"], one["probabilities"]))
    for found, given in doors[1:]:
        assert found == prediction
        assert given == pytest.approx(doors[0][1], abs=1e-5)
