"""What processes report of themselves, and the message about their differences."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import environment, run
from tests.toy import prepare_toy
from trainer.config import load_config
from trainer.distributed.consistency import differences, folder_fingerprint, report

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agree")
    prepare_toy("meld", folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3 << 23))
    return folder


@pytest.fixture
def actual(data: Path, model: Path) -> dict[str, Any]:
    return report(load_config(TINY, ["task=meld", f"data.path={data}/{{task}}", f"model.backbone.name={model}"]))


def on(report: dict[str, Any], where: str, **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(report), "where": where, **changes}


def test_a_report_says_what_this_process_runs_with(actual: dict[str, Any], data: Path) -> None:
    assert actual["versions"]["torch"] == importlib.metadata.version("torch")
    assert actual["versions"]["python"] == platform.python_version()
    assert actual["data"] == {"meld": json.loads((data / "meld" / "record.json").read_text())["fingerprint"]}
    assert not actual["faults"]
    assert differences([on(actual, "a"), on(actual, "b")]) == []


def test_all_differences_are_in_one_message_with_the_ranks_values(actual: dict[str, Any]) -> None:
    changed = on(actual, "node9")
    changed["versions"]["peft"] = "0.1"
    changed["config"]["train.seed"] = "7"
    changed["data"]["meld"] = "another"
    result = differences([*(on(actual, f"node{i}") for i in range(9)), changed])
    assert len(result) == 3
    assert result[0] == (
        f"peft differs: {importlib.metadata.version('peft')} on node0, node1, node2, node3 and 5 more; 0.1 on node9"
    )
    assert result[1] == "setting train.seed differs: 0 on node0, node1, node2, node3 and 5 more; 7 on node9"
    assert "data of meld differs" in result[2]


def test_absent_data_and_models_are_faults_of_the_node_that_lacks_them(actual: dict[str, Any], data: Path) -> None:
    lacking = report(load_config(TINY, ["task=meld", "data.path=/none/{task}", "model.backbone.name=/none/model"]))
    result = differences([on(actual, "a"), on(lacking, "b", config=actual["config"])])
    assert [line for line in result if "/none/meld is not a prepared dataset" in line and "(on b)" in line]
    assert [line for line in result if "no model folder /none/model" in line and "(on b)" in line]


def test_a_folder_that_is_not_shared_is_refused(actual: dict[str, Any]) -> None:
    result = differences([on(actual, "a", shared=True), on(actual, "b", shared=False)])
    assert len(result) == 1
    assert "the run folder is not shared: b cannot see" in result[0]


@pytest.mark.parametrize("place", [0, 1000, (3 << 23) - 1])
def test_a_models_fingerprint_sees_changed_bytes_at_both_ends(model: Path, place: int) -> None:
    before = folder_fingerprint(model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[place] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    assert folder_fingerprint(model) != before


def test_a_node_tells_its_report_as_one_json_object(data: Path) -> None:
    command = [sys.executable, "-m", "launch.start.nodes", str(TINY), "task=meld", f"data.path={data}/{{task}}"]
    done = run(command, env=environment(), cwd=ROOT, timeout=400)
    result = json.loads(done.stdout)
    assert result["cpus"] >= 1
    assert not result["faults"]
    bad = run([*command, "train.sed=1"], env=environment(), cwd=ROOT, timeout=400)
    assert "train.sed: unknown key; did you mean seed?" in json.loads(bad.stdout)["faults"]["config"]
