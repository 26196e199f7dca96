"""train.deterministic: what is set inside a run, and that nothing of it is left behind."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils import deterministic

from trainer.config import load_config
from trainer.distributed.deepspeed_config import check_machine
from trainer.run.determinism import deterministic_algorithms, set_variables


def state() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        cudnn.deterministic,
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
    )


@pytest.mark.parametrize("given", [None, ":16:8"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_set_and_given_back(monkeypatch: pytest.MonkeyPatch, given: str | None, fails: bool) -> None:
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    before = state()
    try:
        with deterministic_algorithms(True):
            assert state() == (True, False, False, True, False, given or ":4096:8", "1")
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state() == before
    with deterministic_algorithms(False):
        assert state() == before


def test_what_libraries_read_once_is_set_before_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")  # by the user
    set_variables()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
    with deterministic_algorithms(True):
        pass
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_kernels_that_are_chosen_by_timing_are_refused_on_a_gpu(device: str) -> None:
    words = ["train.deterministic=true", "model.backbone.attention=flex", "model.fusion.compile=true"]
    config = load_config("meld", words)
    if device == "cpu":
        check_machine(config, torch.device(device))  # flex attention is refused there for another reason, later
        return
    with pytest.raises(ValueError, match=r"attention=flex, whose compiled .*\n.*compile=true, whose compiled"):
        check_machine(config, torch.device(device))
    check_machine(load_config("meld", words[1:]), torch.device(device))


def test_a_workspace_with_which_cublas_does_not_repeat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1024:1")
    before = state()
    with (
        pytest.raises(ValueError, match=r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 .*':1024:1': unset"),
        deterministic_algorithms(True),
    ):
        pass
    assert state() == before
    with deterministic_algorithms(False):  # nobody asked
        assert state() == before
