"""Every family of docs/backbones.md in parts over two ranks (ZeRO-3), against the same loaded whole by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_ranks
from tests.models.families import FAMILIES, save_public

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAMES = [name for name, family in FAMILIES.items() if family.refused is None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root, out = tmp_path_factory.mktemp("families"), tmp_path_factory.mktemp("two")
    cases = {}
    for place, name in enumerate(NAMES):
        save_public(FAMILIES[name], root / str(place))
        cases[name] = {"folder": str(place), "dtype": "float32", "backbone": {}}
    (root / "cases.json").write_text(json.dumps(cases))
    run_ranks("tests.distributed.sharded_worker", str(root), str(root), str(out), "equality", timeout=500)
    return json.loads((Path(out) / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_family_in_parts_is_the_whole_model(found, name):
    for rank in found:
        result = rank["equality"][name]
        for key in ("finite", "equal", "hash", "all cut up"):
            assert result[key], key
