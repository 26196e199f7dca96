"""Faults of published data: one small object each while they are found, one report at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.data.preparation.record import FaultGroup

SHOWN = 10  # ids, places and details that a report shows of each kind


class DataError(ValueError):
    """Data that cannot be used; the message lists every fault: how many, where, and what to do."""


@dataclass(frozen=True)
class Fault:
    """One fault of one sample (or, without id and place, of a split). `repair` says what its one right repair is."""

    kind: str
    split: str
    id: str = ""
    where: str = ""
    detail: str = ""
    repair: str = ""


def group_faults(faults: Iterable[Fault], *, repair: bool = True, otherwise: str = "refused") -> list[FaultGroup]:
    """The faults by kind, in order of appearance, as the dataset's record keeps them.

    A group has `kind`, `n` samples, `splits` (samples of each), the first `ids` and `where`, the commonest `details` with
    their counts, and `action`: the repair (if `repair`), else `otherwise`.
    """
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.kind, (repair and fault.repair) or otherwise), []).append(fault)
    return [
        {
            "kind": kind,
            "n": len(found),
            "splits": dict(Counter(f.split for f in found)),
            "ids": [f.id for f in found if f.id][:SHOWN],
            "where": [f.where for f in found if f.where][:SHOWN],
            "details": dict(Counter(f.detail for f in found if f.detail).most_common(SHOWN)),
            "action": action,
        }
        for (kind, action), found in kinds.items()
    ]


def describe(groups: Iterable[FaultGroup]) -> list[str]:
    """One line for each group of :func:`group_faults`."""
    return [_line(g) for g in groups]


def _line(g: FaultGroup) -> str:
    splits = ", ".join(f"{split} {n}" for split, n in g["splits"].items())
    line = f"{g['kind']}: {g['n']} ({splits}), {g['action']}"
    if g["details"]:
        line += ": " + ", ".join(f"{d} ({n} times)" if n > 1 else d for d, n in g["details"].items())
    if g["where"]:
        first = g["where"][:3]
        ids = g["ids"][:3] if len(g["ids"]) >= len(first) else []
        places = [f"{i} [{w}]" for i, w in zip(ids, first, strict=True)] if ids else first
        line += "; first: " + ", ".join(places)
    elif g["ids"]:
        line += "; first: " + ", ".join(g["ids"][:3])
    return line
