"""docs/serving.md: its commands answer as written, its limits are the server's."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, environment
from tests.serving.http.servers import serving
from trainer.serving.http.limits import Limits
from trainer.serving.predictor import Predictor

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) if "curl" in block]


def test_the_commands_of_the_page_are_answered(predictor: Predictor, tmp_path: Path) -> None:
    assert len(BLOCKS) == 4
    answered = 0
    with serving(predictor) as server:
        for block in BLOCKS:
            for command in re.split(r"^(?=curl|python)", block, flags=re.M):
                command = command.replace("localhost:8000", f"localhost:{server.port}")
                done = subprocess.run(
                    ["bash", "-euc", command], cwd=tmp_path, env=environment(), capture_output=True, text=True
                )
                assert done.returncode == 0, (command, done.stderr)
                assert '"error"' not in done.stdout, (command, done.stdout)
                if "/v1/predict" in command:
                    [line] = json.loads(done.stdout)["predictions"]
                    assert line["task"] == "meld"
                    answered += 1
    assert answered == 3


@pytest.mark.parametrize("name", list(asdict(Limits())))
def test_the_limits_of_the_page_are_the_servers(name: str) -> None:
    usual = asdict(Limits())[name]
    if name == "max_wait_ms":
        assert f"`--max-wait-ms` ({usual:g})" in PAGE
    else:
        assert f"| `--{name.replace('_', '-')}` | {usual:g} |" in PAGE


def test_the_figures_of_the_page_are_the_servers(predictor: Predictor) -> None:
    with serving(predictor) as server:
        told = server.get("/metrics").body.decode()
    named = set(re.findall(r"`(egmf_\w+)`", PAGE))
    given = set(re.findall(r"^# TYPE (egmf_\w+?) (?:counter|gauge|histogram)$", told, re.M))
    assert named == {name for name in given if not name.endswith("_created")}
