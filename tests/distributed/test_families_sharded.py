"""Every family of docs/backbones.md in parts over two ranks (ZeRO-3), against the same loaded whole by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_ranks
from tests.models.families import FAMILIES, save_public
from tests.toy import prepare_toy

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAMES = [name for name, family in FAMILIES.items() if family.refused is None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root, out = tmp_path_factory.mktemp("families"), tmp_path_factory.mktemp("two")
    cases = {}
    for place, name in enumerate(NAMES):
        save_public(FAMILIES[name], root / str(place))
        cases[name] = {"folder": str(place), "dtype": "float32", "backbone": {}, "experts": FAMILIES[name].experts}
    (root / "cases.json").write_text(json.dumps(cases))
    prepare_toy("meld", root / "data")
    run_ranks(
        "tests.distributed.sharded_worker", str(root), str(root / "data"), str(out), "equality", "adapted", timeout=560
    )
    return json.loads((Path(out) / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_family_in_parts_is_the_whole_model(found, name):
    for rank in found:
        result = rank["equality"][name]
        for key in ("finite", "equal", "hash", "all cut up"):
            assert result[key], key


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].experts])
def test_lora_of_a_mixture_of_experts_in_parts_learns_as_the_whole_model(found, name):
    for rank in found:
        result = rank["adapted"][name]
        assert result["loss"] < 1e-4
        assert result["gradient"] < 1e-3
        assert result["learns"] > 0
        assert result["all"]
        assert result["in parts"]
        assert not result["experts"]  # which are fused: LoRA adapts the layers beside them
