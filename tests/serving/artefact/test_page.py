"""The commands of docs/export.md, as they are written there, one after the other; only the names of runs and bases are others."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.distributed.processes import ROOT, egmf
from tests.serving.artefact.hub import local_hub
from tests.serving.artefact.made import train
from tests.toy import prepare_toy


def commands() -> list[str]:
    lines = (ROOT / "docs/export.md").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.startswith("    egmf ")]


def test_the_pages_commands_run(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path)
    run = train(tmp_path / "run", "task=meld", f"data.path={tmp_path}/{{task}}")
    (tmp_path / "new.jsonl").write_text('{"id": "new", "text": "I told you so."}\n')
    names = {"runs/mine": str(run), "models/": f"{tmp_path}/models/", "OWNER/NAME": "group/model"}
    names |= {"new.jsonl": f"{tmp_path}/new.jsonl", "answers.jsonl": f"{tmp_path}/answers.jsonl"}
    found = commands()
    assert [line.split()[1] for line in found] == ["export", "predict", "predict", "export", "push", "push"]
    with local_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
        for line in found:
            written = line.replace("/models/Qwen3-4B", "tiny")  # the base of this run, which lies in the folder itself
            for name, other in names.items():
                written = written.replace(name, other)
            done = egmf(*shlex.split(written)[1:], **(settings if " push " in line else {}))
            assert done.returncode == 0, (line, done.stderr)
        assert "v1" in hub.branches
    (answer,) = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["id"] == "new"
