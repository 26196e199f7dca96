"""train.deterministic: what is set inside a run, and that nothing of it is left behind."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils import deterministic

from trainer.run.determinism import deterministic_algorithms


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
