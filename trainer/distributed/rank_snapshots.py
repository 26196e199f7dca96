"""Where the ranks of a stuck run wait: the stacks of each, and what they show together."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import sysconfig
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as dist
from pydantic import BaseModel, Field

from trainer.distributed.flight import FlightRecord, difference
from trainer.distributed.messages import format_ranks

PACKAGE = Path(__file__).parents[1]
STANDARD = sysconfig.get_path("stdlib")
COLLECTIVES = (
    "torch/distributed/distributed_c10d.py"  # every collective of torch passes through a function of this file
)
WRAPPERS = ("wrapper", "_wrapper")


class Frame(BaseModel):
    """A place in a program."""

    file: str
    line: int
    function: str
    code: str

    @property
    def library(self) -> bool:
        """Neither this package's code nor a program's that uses it."""
        if Path(self.file).is_relative_to(PACKAGE):
            return False
        return "site-packages" in self.file or self.file.startswith(("<", STANDARD))

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.line} in {self.function}"


class RankSnapshot(BaseModel):
    """One rank when the alarm was raised: what it did last, and the stacks of its threads, the main thread's first."""

    rank: int
    host: str
    pid: int
    doing: str
    seconds: float  # since it last made progress
    threads: dict[str, list[Frame]]
    entered: dict[str, int]  # process group -> collectives that this rank has entered
    flight: FlightRecord = Field(default_factory=dict)  # its last collectives

    @property
    def main(self) -> list[Frame]:
        return next(iter(self.threads.values()))

    @property
    def collective(self) -> str | None:
        """The collective that one of the threads waits in."""
        for frames in self.threads.values():
            for frame in frames:
                if frame.file.endswith(COLLECTIVES) and frame.function not in WRAPPERS:
                    return frame.function
            if frames and ".wait(" in frames[-1].code and "deepspeed" in frames[-1].file:
                return "a collective that was started before"
        return None

    @property
    def place(self) -> str:
        """The innermost line outside libraries, and the innermost of all."""
        own = next((frame for frame in reversed(self.main) if not frame.library), None)
        last = self.main[-1] if self.main else None
        if own is None or last is None or own == last:
            return str(last or "no Python code")
        return f"{own} (there {last})"


def take_snapshot(rank: int, doing: str, seconds: float, hidden: Iterable[int | None] = ()) -> RankSnapshot:
    """This process's snapshot; `hidden` threads (their identifiers) are left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    first = threading.main_thread().ident
    stacks = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    threads = {
        f"{names.get(ident, 'a thread of a library')} ({ident})": [
            Frame(file=f.filename, line=f.lineno or 0, function=f.name, code=f.line or "")
            for f in traceback.extract_stack(frame)
        ]
        for ident, frame in stacks
        if ident not in set(hidden)
    }
    return RankSnapshot(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        doing=doing,
        seconds=seconds,
        threads=threads,
        entered=_entered(),
    )


def headline(snapshots: Mapping[int, RankSnapshot], silent: Iterable[int], seconds: float) -> str:
    """Who is to blame, in one sentence: the ranks that do not answer, else those that are not where the others wait.

    Behind it stands which collective of which rank differs, where torch's flight recorder shows one.
    """
    found = difference({rank: one.flight for rank, one in snapshots.items()})
    return _blame(snapshots, silent, seconds) + (f"; {found}" if found else "")


def _blame(snapshots: Mapping[int, RankSnapshot], silent: Iterable[int], seconds: float) -> str:
    silent = sorted(silent)
    head = f"no progress for {seconds:.0f} s"
    waiting = [r for r, one in snapshots.items() if one.collective]
    elsewhere = [r for r in snapshots if r not in waiting]
    behind = _behind(snapshots)
    if silent:
        causes = "frozen (stopped), dead, holding Python's lock in native code, or cut off from the network"
        others = f"; {_where(snapshots)}" if snapshots else ""
        return f"{head}: {format_ranks(silent)} did not answer: {causes}{others}"
    if waiting and elsewhere:
        late = {r: snapshots[r] for r in elsewhere}
        in_collective = {r: snapshots[r] for r in waiting}
        return (
            f"{head}: {format_ranks(elsewhere)} {_are(elsewhere)} not in the collective that {format_ranks(waiting)} "
            f"{_wait(waiting)} in; {_where(late)}; {_where(in_collective)}"
        )
    if waiting and len({(snapshots[r].collective, snapshots[r].place) for r in waiting}) > 1:
        return f"{head}: the ranks wait in different collectives; {_where(snapshots)}"
    if behind:
        return f"{head}: {format_ranks(behind)} {_are(behind)} behind the others: fewer collectives entered; {_where(snapshots)}"
    if waiting and len(snapshots) > 1:
        return f"{head}: all ranks wait in the same collective, so the network between them is at fault; {_where(snapshots)}"
    return f"{head}, and no rank waits for another; {_where(snapshots)}"


def format_stacks(snapshots: Mapping[int, RankSnapshot], silent: Iterable[int]) -> str:
    """The stacks of all ranks; ranks with the same stacks share one."""
    groups: dict[str, list[RankSnapshot]] = defaultdict(list)
    for one in snapshots.values():
        groups[repr((one.collective, one.main))].append(one)
    lines = []
    for group in groups.values():
        first = group[0]
        where = f"in the collective {first.collective}" if first.collective else "in no collective"
        lines.append(
            f"{format_ranks([one.rank for one in group])}: {where}; last progress {first.seconds:.0f} s ago: {first.doing}; "
            f"process {first.pid} on {first.host}"
        )
        for name, frames in first.threads.items():
            lines.append(f"  {name}")
            lines += [f"    {frame}: {frame.code}" for frame in frames]
    lines += [f"rank {rank}: no answer" for rank in sorted(silent)]
    return "\n".join(lines)


def _where(snapshots: Mapping[int, RankSnapshot]) -> str:
    places: dict[str, list[int]] = defaultdict(list)
    for rank, one in snapshots.items():
        places[f"in {one.collective}, from {one.place}" if one.collective else f"at {one.place}"].append(rank)
    return "; ".join(f"{format_ranks(ranks)} {_are(ranks)} {place}" for place, ranks in places.items())


def _behind(snapshots: Mapping[int, RankSnapshot]) -> list[int]:
    most: dict[str, int] = {}
    for one in snapshots.values():
        for group, count in one.entered.items():
            most[group] = max(count, most.get(group, 0))
    return [r for r, one in snapshots.items() if any(count < most[group] for group, count in one.entered.items())]


def _entered() -> dict[str, int]:
    """Collectives entered, per process group; torch counts them for its own checks and has no public name for it."""
    found: dict[str, int] = {}
    if dist.is_initialized():
        with contextlib.suppress(AttributeError, RuntimeError):
            for group in dist.distributed_c10d._world.pg_map:
                found[group.group_name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return found


def _short(file: str) -> str:
    """Without what lies above site-packages, the standard library, or this package."""
    path = Path(file)
    if path.is_relative_to(PACKAGE.parent):
        inside_checkout = path.relative_to(PACKAGE.parent)
        if "site-packages" not in inside_checkout.parts:
            return str(inside_checkout)
    _, found, inside = file.rpartition("site-packages/")
    return inside if found else file.removeprefix(f"{STANDARD}/")


def _are(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _wait(ranks: list[int]) -> str:
    return "waits" if len(ranks) == 1 else "wait"
