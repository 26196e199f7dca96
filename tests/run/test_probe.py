"""Which batches the probe tries, and when a run that goes on may leave it out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import RunConfig, check_config
from trainer.data.sampling import Limits, MicroBatch, Sizes
from trainer.distributed.world import World
from trainer.run.guards import probe_record
from trainer.run.guards.probe import need_of, uncovered
from trainer.run.guards.probe_record import RECORD, once

ALONE = World(0, 1, torch.device("cpu"))
PACKED = Limits(tokens=1000)


def test_what_a_batch_needs_counts_padding_inside_its_groups() -> None:
    sizes = Sizes(prefix=10, tokens_N=np.array([5, 7, 20]), read_N3=np.array([[4, 8, 0], [6, 2, 1], [1, 30, 3]]))
    assert need_of(MicroBatch((0, 1, 2), 1.0, (2, 1)), sizes, PACKED) == (3, 42, 20, max(2 * (6 + 8 + 1), 34))
    assert need_of(MicroBatch((0, 1, 2), 1.0, (3,)), sizes, PACKED) == (3, 42, 20, 3 * (6 + 30 + 3))
    assert need_of(MicroBatch((0, 1), 1.0, (2,)), sizes, Limits(1000, packed=False)) == (2, 2 * (10 + 7), 7, 30)
    assert need_of(MicroBatch((0,), 1.0, (1, 0)), sizes, PACKED) == (1, 15, 5, 12)  # a group without samples


def test_only_a_batch_that_needs_no_more_of_anything_is_left_out() -> None:
    most = (32, 500, 20, 3000)
    others = {
        "fewer": (16, 400, 20, 3000),
        "longer": (16, 400, 24, 3000),
        "more": (40, 400, 10, 100),
        "wide": (8, 100, 9, 5000),
    }
    kept = {name for _, name in uncovered([*((need, name) for name, need in others.items()), (most, "most")])}
    assert kept == {"most", "longer", "more", "wide"}
    assert [name for _, name in uncovered([(most, "a"), (most, "b")])] == ["a"]
    nearly = (
        ((32, 1000, 20, 3000), "full"),
        ((31, 1010, 20, 3000), "a sample more or less"),
        ((31, 1100, 20, 3000), "fuller"),
    )
    assert [name for _, name in uncovered(nearly)] == ["full", "fuller"]
    assert uncovered([]) == []


def config(**train: Any) -> RunConfig:
    return check_config({"task": "meld", "train": train})


def parts(data: str = "d", base: str = "b") -> Any:
    backbone = SimpleNamespace(fingerprints=SimpleNamespace(source=base))
    return SimpleNamespace(fingerprints={"meld": data}, model=SimpleNamespace(backbone=backbone))


def probed(out: Path, asked: RunConfig | None = None, made: Any = None) -> bool:
    calls: list[int] = []
    said = once(out, asked or config(), made or parts(), ALONE, lambda: calls.append(1))
    assert said == bool(calls)
    return said


def test_what_passed_is_not_tried_again_and_anything_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probed(tmp_path)
    assert not probed(tmp_path)
    assert not probed(
        tmp_path, check_config({"task": "meld", "track": {"run_name": "again"}})
    )  # nothing that is computed
    assert probed(tmp_path, config(probe="always"))
    changes: list[dict[str, Any]] = [
        {"asked": config(micro_tokens=4096)},
        {"asked": config(seed=1)},
        {"asked": check_config({"task": "meld", "eval": {"tokens": 999}})},
        {"asked": check_config({"task": "meld", "deepspeed": {"zero_allow_untested_optimizer": True}})},
        {"made": parts(data="other")},
        {"made": parts(base="other")},
    ]
    for change in changes:
        assert probed(tmp_path, **change), change
        assert not probed(tmp_path, **change), change
    assert probed(tmp_path)
    about, machine = probe_record.environment(), probe_record._machine
    with monkeypatch.context() as patch:
        patch.setattr(probe_record, "environment", lambda: {**about, "versions": {**about["versions"], "torch": "0"}})
        assert probed(tmp_path)
    assert probed(tmp_path)
    for key in ("memory", "limits", "threads", "gpu", "processor"):
        with monkeypatch.context() as patch:
            patch.setattr(probe_record, "_machine", lambda device, key=key: {**machine(device), key: "other"})
            assert probed(tmp_path), key
        assert probed(tmp_path)


def test_it_is_tried_again_where_less_memory_can_be_had_than_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probed(tmp_path)
    memory = json.loads((tmp_path / RECORD).read_text())["memory"]
    assert memory > 50 << 20  # of this process: torch alone takes more
    monkeypatch.setattr(probe_record, "_reachable", lambda world: memory)
    assert not probed(tmp_path)
    monkeypatch.setattr(probe_record, "_reachable", lambda world: memory - 1)
    assert probed(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"key": 3, "memory": 1}', '{"key": "KEY", "memory": "1"}', '{"key": "KEY"}']
)
def test_a_damaged_record_counts_for_nothing(tmp_path: Path, content: str) -> None:
    assert probed(tmp_path)
    key = json.loads((tmp_path / RECORD).read_text())["key"]
    (tmp_path / RECORD).write_text(content.replace("KEY", key))
    assert probed(tmp_path)
    assert not probed(tmp_path)


def test_a_probe_that_fails_leaves_no_record(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        once(tmp_path, config(), parts(), ALONE, fails)
    assert not (tmp_path / RECORD).exists()
    assert probed(tmp_path)
