"""train.profile: a trace and a table of some steps, and a training that is bit for bit what it is without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.distributed.processes import egmf
from tests.toy import prepare_toy
from trainer.config import load_config
from trainer.config_files import ConfigError
from trainer.tracking.journal import read_journal

SMALL = (
    "model.backbone.tiny.vocab_size=400", "model.fusion.width=32", "train.global_batch=8", "train.steps=6", "train.eval_every=3",
    "train.log_every=1", "train.probe=false", "train.zero=0", "track.system_metrics=false", "track.report=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    prepare_toy("meld", folder)
    return folder


def train(folder: Path, out: str, *overrides: str) -> Path:
    done = egmf(
        "train",
        "configs/tiny.yaml",
        "task=meld",
        f"data.path={folder}/meld",
        *SMALL,
        *overrides,
        "--out",
        str(folder / out),
    )
    assert done.returncode == 0, done.stderr
    return folder / out


@pytest.mark.slow
def test_the_steps_are_profiled_and_nothing_else_changes(folder: Path) -> None:
    plain, profiled = train(folder, "plain"), train(folder, "profiled", "train.profile=[2,4]")
    assert read_journal(profiled / "journal.jsonl")["train/loss"] == read_journal(plain / "journal.jsonl")["train/loss"]
    name = "checkpoints/step-00000006/model.safetensors"
    assert (profiled / name).read_bytes() == (plain / name).read_bytes()
    assert not (plain / "profile").exists()
    found = sorted(path.name for path in (profiled / "profile").iterdir())
    assert found == ["table-steps-2-4.txt", "trace-steps-2-4.json.gz"]
    events = json.loads(gzip.decompress((profiled / "profile" / found[1]).read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    steps = sum(name.startswith("Optimizer.step") for name in names)
    assert steps == 3, "one for each profiled step"
    assert any(name == "aten::mm" for name in names)
    table = (profiled / "profile" / found[0]).read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "attributes.run_name = 'profiled'"
    )
    assert {a.path for a in client.list_artifacts(runs[0].info.run_id, "profile")} == {
        f"profile/{one}" for one in found
    }


@pytest.mark.slow
def test_steps_beyond_the_training_write_what_there_is(folder: Path) -> None:
    out = train(folder, "short", "train.profile=[6,100]", "track.mlflow=false")
    assert sorted(path.name for path in (out / "profile").iterdir()) == [
        "table-steps-6-6.txt",
        "trace-steps-6-6.json.gz",
    ]
    again = train(folder, "none", "train.profile=[7,9]", "track.mlflow=false")
    assert not (again / "profile").exists()


@pytest.mark.parametrize("steps", ["[4,2]", "[0,2]", "[2]", "3", "[1,2,3]"])
def test_steps_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.profile"):
        load_config("tiny", [f"train.profile={steps}"])
