"""The last collectives of every rank, from torch's flight recorder, and which rank's differ from the others'.

The recorder is on for gloo and NCCL alike. What this package reads of it is its JSON; the pickles that NCCL's own time-out writes
are for torch's tool (``torchfrtrace``) and are never opened here. Its functions have no public names in torch.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from trainer.distributed.messages import format_ranks

FOLDER = "flight"  # in the run folder
SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # the name, and its older one
FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP = "TORCH_NCCL_DUMP_ON_TIMEOUT"
ENTRIES = 2000  # collectives that a rank remembers; about 1 kB each
KEPT = 40  # of each process group, that the ranks tell each other
READERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # of NCCL, and of every other backend
UNEVEN = ("all_to_all", "alltoall", "send", "recv", "coalesced")  # ranks may differ in their sizes


class Collective(BaseModel):
    """A collective that a rank has entered: its name, and the sizes and dtypes of its input."""

    name: str
    sizes: list[list[int]]
    dtypes: list[str]

    @property
    def common(self) -> tuple[str, str, str]:
        """What all ranks of a process group must have in common."""
        uneven = self.name == "scatter" or any(word in self.name for word in UNEVEN)
        return (self.name, "" if uneven else str(self.sizes), str(self.dtypes))

    def __str__(self) -> str:
        shapes = ", ".join(f"{dtype}{sizes}" for sizes, dtype in zip(self.sizes, self.dtypes, strict=False))
        return f"{self.name} of {shapes}" if shapes else self.name


FlightRecord = dict[str, dict[int, Collective]]  # process group -> number of the collective in it -> what it was


def turn_on(environment: MutableMapping[str, str], nccl: bool) -> None:
    """Have torch record collectives, before a process group exists; what the user has set stays."""
    if not any(name in environment for name in SIZE):
        environment[SIZE[0]] = str(ENTRIES)
    if nccl:
        environment.setdefault(DUMP, "1")


def keep_files_in(out: Path, environment: MutableMapping[str, str]) -> None:
    """Have NCCL's time-out write into the run folder: ``flight/nccl_rank_<rank>``, of the ranks of each node on its storage."""
    if not any(name in environment for name in FILE):
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        environment[FILE[0]] = str((out / FOLDER).absolute() / "nccl_rank_")


def take_flight_record(file: Path | None, seconds: float) -> FlightRecord:
    """This rank's last collectives; all that torch remembers goes into `file`. Empty where it does not answer in `seconds`.

    It is asked by a thread of its own, since a GPU's driver that hangs may let it wait.
    """
    found: list[dict[str, Any]] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever fails here must not hide why the run is ended
            found.extend(_dumps())
            if file is not None and found:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found if len(found) > 1 else found[0]), encoding="utf-8")

    asking = threading.Thread(target=ask, name="flight recorder", daemon=True)
    asking.start()
    asking.join(seconds)
    record: FlightRecord = {}
    with contextlib.suppress(Exception):  # a torch that writes other keys
        for dump in list(found):
            record |= read_dump(dump)
    return record


def _dumps() -> list[dict[str, Any]]:
    """What torch's recorders hold, those that have entries."""
    module = torch._C._distributed_c10d
    readers = [getattr(module, name) for name in READERS if hasattr(module, name)]
    return [dump for reader in readers if (dump := json.loads(reader(True, False))).get("entries")]


def read_dump(dump: Mapping[str, Any]) -> FlightRecord:
    """The last collectives of each process group in a dump of torch's (version 2); point-to-point messages are left out."""
    groups: dict[str, dict[int, Collective]] = defaultdict(dict)
    for entry in dump["entries"]:
        if not entry["is_p2p"]:
            group = " ".join(dict.fromkeys(filter(None, entry["process_group"])))
            _, _, name = entry["profiling_name"].rpartition(":")
            made = Collective(name=name, sizes=entry["input_sizes"], dtypes=entry["input_dtypes"])
            groups[group].setdefault(entry["collective_seq_id"], made)  # the first of those that are coalesced into one
    return {group: dict(sorted(of.items())[-KEPT:]) for group, of in groups.items()}


def difference(records: Mapping[int, FlightRecord]) -> str | None:
    """Which collective of which rank differs from the others', in words; None where none does.

    In each process group the first collective that two ranks entered under one number and that is not the same; where there is none,
    the first that some ranks have not entered.

    Args:
        records: by rank.
    """
    found = []
    for group in dict.fromkeys(group for record in records.values() for group in record):
        members = {rank: record[group] for rank, record in records.items() if record.get(group)}
        words = _other_kind(members) or _not_entered(members)
        if words is not None:
            found.append(f"process group {group}: {words}")
    return "; ".join(found) or None


def _other_kind(members: Mapping[int, dict[int, Collective]]) -> str | None:
    for number in sorted({number for one in members.values() for number in one}):
        entered = {rank: one[number] for rank, one in members.items() if number in one}
        kinds: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for rank, collective in entered.items():
            kinds[collective.common].append(rank)
        if len(kinds) > 1:
            few_last = sorted(kinds.values(), key=len, reverse=True)
            parts = [f"{format_ranks(ranks)} entered {entered[ranks[0]]}" for ranks in few_last]
            return f"collective {number} differs: {', '.join(parts)}"
    return None


def _not_entered(members: Mapping[int, dict[int, Collective]]) -> str | None:
    last = {rank: max(one) for rank, one in members.items()}
    behind = [rank for rank, number in last.items() if number < max(last.values())]
    if not behind:
        return None
    number = min(last[rank] for rank in behind) + 1
    lacking = [rank for rank in behind if last[rank] < number]
    collective = next((one[number] for one in members.values() if number in one), None)
    return (
        f"{format_ranks(lacking)} did not enter collective {number}, {collective or 'which the others have long left'}"
    )
