"""Which collective of which rank differs, in dumps of torch's flight recorder; real ones of gloo are in test_watch.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.distributed.flight import (
    KEPT,
    SIZE,
    Collective,
    FlightRecord,
    difference,
    keep_files_in,
    read_dump,
    take_flight_record,
    turn_on,
)


def made(name: str = "all_reduce", size: int = 4, dtype: str = "Float") -> Collective:
    return Collective(name=name, sizes=[[size]], dtypes=[dtype])


def record(*collectives: Collective, group: str = "0 default_pg", first: int = 1) -> FlightRecord:
    return {group: dict(enumerate(collectives, first))}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({0: record(made(), made()), 1: record(made(), made())}, None),
        ({0: record(made())}, None),
        ({}, None),
        (
            {0: record(made(), made()), 1: record(made(), made("broadcast")), 2: record(made(), made())},
            "collective 2 differs: ranks 0, 2 entered all_reduce of Float[4], rank 1 entered broadcast of Float[4]",
        ),
        (
            {0: record(made(size=4)), 1: record(made(size=8))},
            "collective 1 differs: rank 0 entered all_reduce of Float[4], rank 1 entered all_reduce of Float[8]",
        ),
        (
            {0: record(made()), 1: record(made(dtype="BFloat16"))},
            "collective 1 differs: rank 0 entered all_reduce of Float[4], rank 1 entered all_reduce of BFloat16[4]",
        ),
        ({0: record(made("all_to_all", 4)), 1: record(made("all_to_all", 8))}, None),  # parts may be uneven
        (
            {0: record(made(), made("all_gather", 3)), 1: record(made())},
            "rank 1 did not enter collective 2, all_gather of Float[3]",
        ),
        (  # what differs comes before what is missing
            {0: record(made(), made(), made()), 1: record(made(), made("broadcast"))},
            "collective 2 differs: rank 0 entered all_reduce of Float[4], rank 1 entered broadcast of Float[4]",
        ),
        (  # the others' records begin after the last of this rank's
            {0: record(made(), made(), first=90), 1: record(made(), first=3)},
            "rank 1 did not enter collective 4, which the others have long left",
        ),
    ],
)
def test_what_differs(records: dict[int, FlightRecord], expected: str | None) -> None:
    words = difference(records)
    assert words == (None if expected is None else f"process group 0 default_pg: {expected}")


def test_each_process_group_is_compared_by_itself() -> None:
    both = {"0 default_pg": {1: made()}, "1 data": {1: made("broadcast")}}
    behind = {"0 default_pg": {1: made()}, "1 data": {1: made("broadcast"), 2: made("all_gather")}}
    words = difference({0: both, 1: behind, 2: {"0 default_pg": {1: made()}}})  # rank 2 is in no second group
    assert words == "process group 1 data: rank 0 did not enter collective 2, all_gather of Float[4]"


def test_a_dump_is_read_and_its_messages_left_out() -> None:
    def entry(number: int, name: str, **more: Any) -> dict[str, Any]:
        plain = {
            "process_group": ["0", "default_pg"],
            "is_p2p": False,
            "input_sizes": [[number]],
            "input_dtypes": ["Float"],
        }
        return {**plain, "collective_seq_id": number, "profiling_name": f"nccl:{name}", **more}

    entries = [entry(n, "all_reduce") for n in range(1, 101)]
    entries += [entry(101, "send", is_p2p=True), entry(100, "reduce_scatter")]  # the latter coalesced into number 100
    (found,) = read_dump({"entries": entries}).values()
    assert list(found) == list(range(101 - KEPT, 101))
    assert str(found[100]) == "all_reduce of Float[100]"


def test_a_group_of_one_process_records_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own recorder; it is made with a process group, and reads its size then."""
    environment: dict[str, str] = {}
    turn_on(environment, nccl=True)
    assert environment == {SIZE[0]: "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    for name in SIZE:
        theirs = {name: "7"}
        turn_on(theirs, nccl=False)
        assert theirs == {name: "7"}
    keep_files_in(tmp_path, environment)
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "flight" / "nccl_rank_")
    before = dict(environment)
    keep_files_in(tmp_path / "other", environment)
    assert environment == before
    if dist.is_initialized():
        pytest.skip("a process group is there already")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(3))
        dist.broadcast(torch.ones(2, dtype=torch.float64), 0)
        found = take_flight_record(tmp_path / "kept" / "rank0.json", 10.0)
    finally:
        dist.destroy_process_group()
    (of_group,) = found.values()
    assert [str(one) for one in of_group.values()][-2:] == ["all_reduce of Float[3]", "broadcast of Double[2]"]
    assert json.loads((tmp_path / "kept" / "rank0.json").read_text())["entries"]
