"""A checkpoint is continued on another number of ranks as if nothing had changed: 4 to 2, 2 to 1, 1 to 2."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.distributed.processes import run_ranks
from tests.distributed.worlds_worker import BEFORE, CASES
from tests.toy import prepare_toy

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(2400)]
CHANGES = ((4, 2), (2, 1), (1, 2))
LOSS = {False: 1e-5, True: 2e-2}  # relative; bf16 ranks sum rounded gradients in another order


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], Any]:
    data, out = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("worlds")
    prepare_toy("meld", data)
    results: dict[tuple[int, str, str], Any] = {}
    for procs, writers in ((4, ()), (2, (4,)), (1, (2,)), (2, (1,))):
        words = [str(writer) for writer in writers]
        run_ranks("tests.distributed.worlds_worker", str(data), str(out), *words, procs=procs, timeout=550)
        for key, value in json.loads((out / f"results{procs}-{'-'.join(words)}.json").read_text()).items():
            case, writer = key.split()
            results[procs, case, writer] = value
    return results


@pytest.mark.parametrize(("writer", "reader"), CHANGES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_run_goes_on_as_if_nothing_had_changed(result: dict[Any, Any], case: Any, writer: int, reader: int) -> None:
    whole, continued = result[writer, case.name, "whole"], result[reader, case.name, str(writer)]
    half = "bf16" in case.name
    assert continued["ids"] == whole["ids"][BEFORE:]
    assert continued["base"] == whole["base"]
    assert continued["groups"] == whole["groups"]
    np.testing.assert_allclose(continued["losses"], whole["losses"][BEFORE:], rtol=LOSS[half])
    np.testing.assert_allclose(continued["usage"], whole["usage"][BEFORE:], rtol=2e-2 if half else 1e-5)
    assert continued["weights"].keys() == whole["weights"].keys()
    for name, norm in whole["weights"].items():
        assert continued["weights"][name] == pytest.approx(norm, rel=5e-2 if half else 1e-4, abs=1e-5), name
    assert whole["losses"][0] != whole["losses"][-1]


@pytest.mark.parametrize("procs", [2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case.name], ids=lambda case: case.name)
def test_several_ranks_have_the_losses_of_one(result: dict[Any, Any], case: Any, procs: int) -> None:
    alone, together = result[1, case.name, "whole"], result[procs, case.name, "whole"]
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-6)
    assert together["base"] == alone["base"]
