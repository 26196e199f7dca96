"""A Slurm of three nodes, toy data and a config for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.slurm.lab import Lab, missing
from tests.toy import prepare_toy

STEPS = 8


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    why = missing()
    if why:
        pytest.skip(why)
    with Lab(tmp_path_factory.mktemp("slurm") / "lab") as started:
        yield started


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy data and a config whose module dropout is on; `still.yaml` is the same without dropout."""
    folder = tmp_path_factory.mktemp("runs")
    prepare_toy("meld", folder)
    (folder / "toy.yaml").write_text(
        f"""
extends: {ROOT}/configs/tiny.yaml
task: meld
data: {{path: "{folder}/{{task}}"}}
model:
  backbone: {{tiny: {{vocab_size: 400}}}}
  adapter: {{dropout: 0.1}}
  fusion: {{dropout: 0.1}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 6, eval_every: 4, save_every: 2, keep: 9, log_every: 1, probe: false}}
eval: {{batch: 6}}
track: {{system_metrics: false, report: false}}
"""
    )
    (folder / "still.yaml").write_text("extends: toy.yaml\nmodel: {adapter: {dropout: 0.0}, fusion: {dropout: 0.0}}\n")
    return folder
