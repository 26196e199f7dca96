"""Two nodes, toy data and a config for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.multinode.lab import Node, missing, nodes
from tests.toy import prepare_toy

STEPS = 8


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def pair(lab: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes; the launchers run on the first."""
    why = missing()
    if why:
        pytest.skip(why)
    with nodes(lab) as both:
        yield both


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy data, a hostfile of one process a node, and a config whose module dropout is on."""
    folder = tmp_path_factory.mktemp("multinode")
    prepare_toy("meld", folder)
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "toy.yaml").write_text(
        f"""
extends: {ROOT}/configs/tiny.yaml
task: meld
data: {{path: "{folder}/{{task}}"}}
model:
  backbone: {{quantization: nf4, tiny: {{vocab_size: 400}}}}
  adapter: {{dropout: 0.1}}
  fusion: {{dropout: 0.1}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 4, eval_every: 4, save_every: 2, keep: 9, log_every: 1, probe: false}}
track: {{mlflow: false, report: false}}
"""
    )
    return folder
