"""Checkpoint folders that somebody else made: links, other kinds of files, names that lead elsewhere, files that ask for code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint.store import Checkpoints
from trainer.checkpoint.torch_files import ForbiddenContentError, tensors_only
from trainer.checkpoint.weights import CheckpointError
from trainer.distributed.world import World


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(tmp_path / "checkpoints", World(0, 1, torch.device("cpu")))
    found.open()
    return found


@pytest.mark.parametrize("prefix", [".writing-", ".removing-", ".converting-"])
def test_links_and_files_with_temporary_names_are_removed_and_what_they_lead_to_stays(
    checkpoints: Checkpoints, tmp_path: Path, prefix: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    folder = checkpoints.folder
    (folder / f"{prefix}folder").symlink_to(outside)
    (folder / f"{prefix}file").symlink_to(outside / "kept")
    (folder / f"{prefix}nowhere").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / f"{prefix}pipe")
    (folder / f"{prefix}plain").write_text("x")
    (folder / f"{prefix}whole" / "inner").mkdir(parents=True)
    (folder / f"{prefix}whole" / "link").symlink_to(outside)
    checkpoints.open()
    assert list(folder.iterdir()) == []
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc",
        "step-00000001/../../outside",
        ".",
        "",
        "step-1",
        "step-00000001\nstep-00000002",
        "step-0000000\u0661",
        "x" * 10**6,
    ],
)
def test_best_names_a_checkpoint_of_this_folder_or_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside").mkdir()
    (checkpoints.folder / "step-00000001").mkdir()
    (checkpoints.folder / "best").write_text(name)
    with pytest.raises(CheckpointError, match=r"does not hold the name of a checkpoint .* step-00000001") as raised:
        checkpoints.best()
    assert len(str(raised.value)) < 1000
    (checkpoints.folder / "best").write_text("step-00000001\n")
    assert checkpoints.best() == checkpoints.folder / "step-00000001"


def test_a_best_that_leads_to_another_file_shows_nothing_of_it(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password")
    (checkpoints.folder / "best").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="does not hold") as raised:
        checkpoints.best()
    assert "password" not in str(raised.value)


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (_Calls(os.system, "touch /tmp/egmf-owned"), "posix.system"),
        (_Calls(eval, "1"), "eval"),
        (Path("x"), "pathlib"),
        (ForbiddenContentError("x"), "trainer.checkpoint.torch_files.ForbiddenContentError"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_torchs_advice_to_read_all_the_same_is_not_passed_on(
    tmp_path: Path, content: Any, named: str, legacy: bool
) -> None:
    torch.save({"a": content}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ForbiddenContentError) as raised, tensors_only():
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert named in str(raised.value)
    assert len(str(raised.value)) < 100
    for word in ("weights_only", "Re-running", "safe_globals", "trusted"):
        assert word not in str(raised.value)


def test_torchscript_and_plain_pickles_are_refused_too(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(ForbiddenContentError, match="TorchScript"), tensors_only():
        torch.load(tmp_path / "x.pt", weights_only=False)
    (tmp_path / "y.pt").write_bytes(pickle.dumps(_Calls(os.system, "true"), protocol=4))
    with pytest.raises(ForbiddenContentError) as raised, tensors_only():
        torch.load(tmp_path / "y.pt", weights_only=False)
    assert "weights_only" not in str(raised.value)
