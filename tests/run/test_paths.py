"""Every command in folders whose names hold what means something to URIs, YAML, shells, glob patterns or formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from tests.distributed.processes import egmf
from trainer.config import load_config
from trainer.tracking.sqlite_uri import sqlite_uri

NAME = "我的 实验 #1: 50%?x::y&[a]{b}*$HOME'\"\\ -e%20"
SMALL = (
    "model.backbone.tiny.vocab_size=400", "model.fusion.width=32", "train.global_batch=8", "train.steps=2", "train.eval_every=2",
    "train.log_every=1", "train.probe=false", "train.zero=0", "track.system_metrics=false", "track.report=true",
)  # fmt: skip


@pytest.mark.slow
def test_every_command_in_a_folder_with_such_a_name(tmp_path: Path) -> None:
    home = tmp_path / NAME
    source = home / "源 数据#"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        np.save(source / f"声 {i}#?.npy", rng.normal(size=(4, 6)).astype(np.float32))
        label, split = ("joy", "anger", "neutral")[i % 3], "train" if i < 24 else "valid" if i < 32 else "test"
        lines.append({"id": f"s{i}", "text": f"word {i}", "label": label, "split": split, "audio": f"声 {i}#?.npy"})
    (source / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "配 置.yaml").write_text("extends: tiny\ntask: meld\n")
    data, run = home / "数据 集", home / "运行" / "a b#"

    def ran(*arguments: str) -> str:
        done = egmf(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    ran("prepare", "meld", "--source", str(source / "a.jsonl"), "--out", str(data))
    assert "audio frames" in ran("data", "show", str(data))
    overrides = (f"data.path={data}", "model.fusion.modalities=[text,audio]", *SMALL)
    ran("train", str(home / "配 置.yaml"), *overrides, "--out", str(run))
    assert {path.name for path in run.parent.iterdir()} == {"a b#", "mlartifacts", "mlflow.db"}
    client = MlflowClient(sqlite_uri(run.parent / "mlflow.db"))
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.status == "FINISHED"
    assert {"config.yaml", "metrics.json"} <= {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    ran("evaluate", str(run))
    assert json.loads(ran("show", str(run), "--json"))["state"] == "done"
    assert "a b#" in ran("runs", str(run.parent))
    ran("report", str(run))
    ran("baseline", str(data), "--modalities", "text", "--out", str(home / "基线#"))
    (home / "new.jsonl").write_text(json.dumps({"id": "x", "text": "hello", "audio": f"{source}/声 0#?.npy"}) + "\n")
    ran("predict", str(run), "--input", str(home / "new.jsonl"), "--out", str(home / "out #1.jsonl"))
    assert json.loads((home / "out #1.jsonl").read_text())["id"] == "x"
    ran("compare", str(run.parent), "--out", str(home / "cmp #"))
    assert (home / "cmp #" / "compare.html").is_file()
    ran("track", "sync", str(run))
    ran("plan", str(home / "配 置.yaml"), *overrides)
    assert "job%%1" in ran(
        "launch",
        "slurm",
        str(home / "配 置.yaml"),
        "--procs-per-node",
        "1",
        *overrides,
        "--out",
        str(home / "job%1"),
        "--dry-run",
    )
    assert {path.name for path in tmp_path.iterdir()} == {NAME}, "nothing is written to a place that was misread"


@pytest.mark.parametrize(
    "value",
    [NAME, "a #b", "a: b", "[x]/y", "1e3", "yes", "*x", "!x", "%x", " lead", "'", "a\nb", "~/x", "😀", "-", "|"],
)
def test_text_on_the_command_line_is_taken_as_it_is(value: str) -> None:
    config = load_config("tiny", ["task=meld", f"data.path={value}", f"track.tags.note={value}", f"track.uri={value}"])
    assert (config.data.path, config.track.tags["note"], config.track.uri) == (value, value, value)


def test_quoted_text_and_nothing_are_yaml() -> None:
    config = load_config("tiny", ["task=meld", "data.path='a: b'", 'track.tags.x="\\u00e9"', "track.uri=null"])
    assert (config.data.path, config.track.tags["x"], config.track.uri) == ("a: b", "é", None)
    assert load_config("tiny", ["task=meld", "data.path=a", "track.experiment=${data.path}"]).track.experiment == "a"
