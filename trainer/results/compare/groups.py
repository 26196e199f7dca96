"""Which runs are the same experiment: groups of runs that differ by their seed alone, or as the caller says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.identity import effect_of
from trainer.results.compare.compared_run import ComparedRun

LONG = 60  # characters of a group's name, beyond which the runs' own name is tried
SHOWN = 4  # names told of many


@dataclass
class Group:
    """Runs that are the same but for their seed; `settings` are those that differ between the groups."""

    name: str
    settings: dict[str, str | None]
    runs: list[ComparedRun]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def devices(self) -> list[str]:
        return sorted({run.cost.device for run in self.runs if run.cost.device})

    def cost(self) -> tuple[float | None, str | None]:
        """Mean core-hours or GPU-hours of a run, and which; None where a run's are not known or both kinds occur."""
        amounts, units = [run.cost.amount for run in self.runs], {run.cost.unit for run in self.runs}
        known = [amount for amount in amounts if amount is not None]
        if len(known) < len(amounts) or len(units) != 1:
            return None, None
        return sum(known) / len(known), units.pop()

    def speed(self) -> float | None:
        """Mean over runs of their samples per second of training; None where one is not known."""
        speeds = [run.cost.samples_per_second for run in self.runs]
        known = [speed for speed in speeds if speed is not None]
        return sum(known) / len(known) if known and len(known) == len(speeds) else None


def group_runs(runs: Sequence[ComparedRun], by: Sequence[str] = ()) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, and notes: what else differs inside one, and runs that are left out.

    Raises:
        ValueError: a setting that no run has, with the nearest name; a group with two configs for one seed.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.config))
    varying = [k for k in known if len({run.config.get(k) for run in runs}) > 1 and not _aside(k)]
    keys = _named_settings(by, known) if by else varying
    named = all(run.group is not None for run in runs)
    found: dict[Any, list[ComparedRun]] = {}
    for run in runs:
        found.setdefault(run.group if named else tuple(run.config.get(k) for k in keys), []).append(run)
    shown = [k for k in (varying if named else keys) if len({run.config.get(k) for run in runs}) > 1]
    names = [str(key) for key in found] if named else _group_names(list(found.values()), shown)
    groups, notes, faults = [], [], []
    for name, members in zip(names, found.values(), strict=True):
        kept, said, wrong = _one_run_a_seed(name, members, varying)
        faults += wrong
        inside = [k for k in varying if len({run.config.get(k) for run in kept}) > 1]
        if inside:
            said.append(f"the runs of {name} differ in more than their seed: {', '.join(inside)}")
        settings = {k: kept[0].config.get(k) if k not in inside else "(differs)" for k in shown}
        groups.append(Group(name, settings, kept))
        notes += said
    if faults:
        cure = "give such runs groups of their own" if named else "name these settings in --group-by too"
        raise ValueError(
            "\n  ".join([f"a group has several runs of one seed with different settings: {cure}", *faults])
        )
    return groups, notes


def _aside(key: str) -> bool:
    """Whether runs that differ in this setting alone are one group: it says who, where and how much memory, not what."""
    return key == "train.seed" or effect_of(key) in ("execution", "record")


def _named_settings(by: Sequence[str], known: Sequence[str]) -> list[str]:
    keys, faults = [], []
    for name in by:
        some = [key for key in known if key == name or key.startswith(f"{name}.")]
        if not some:
            close = difflib.get_close_matches(name, known, n=1)
            faults.append(f"no run has the setting {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        keys += some
    if faults:
        raise ValueError("\n  ".join(["--group-by:", *faults]))
    return list(dict.fromkeys(keys))


def _group_names(groups: Sequence[Sequence[ComparedRun]], keys: Sequence[str]) -> list[str]:
    """What differs, in short; where that is nothing or long, the runs' common name, if each group has one of its own."""
    ends = [key.rpartition(".")[2] for key in keys]
    short = [
        end if ends.count(end) == 1 else ".".join(key.split(".")[-2:]) for key, end in zip(keys, ends, strict=True)
    ]
    names = [
        ", ".join(f"{s}={_plain(members[0].config.get(k))}" for s, k in zip(short, keys, strict=True))
        for members in groups
    ]
    if len(keys) and max(map(len, names)) <= LONG:
        return names
    stems = [{re.sub(r"[-_/. ]?(s|seed)[-_]?\d+$", "", run.name) or "runs" for run in members} for members in groups]
    own = [stem.pop() for stem in stems if len(stem) == 1]
    return own if len(set(own)) == len(groups) else [f"{i}: {name}" for i, name in enumerate(names, 1)]


def _plain(text: str | None) -> str:
    return "(absent)" if text is None else re.sub(r"['\"]", "", text)


def _one_run_a_seed(
    name: str, members: Sequence[ComparedRun], varying: Sequence[str]
) -> tuple[list[ComparedRun], list[str], list[str]]:
    """Of runs with one seed and one config the newest, whatever its scores; notes about it, and faults: configs that differ."""
    newest: dict[int, ComparedRun] = {}
    notes, faults = [], []
    for run in sorted(members, key=lambda run: run.started):
        other = newest.get(run.seed)
        newest[run.seed] = run
        if other is None:
            continue
        differing = [key for key in varying if run.config.get(key) != other.config.get(key)]
        if differing:
            faults.append(f"{name}, seed {run.seed}: {other.where} and {run.where} differ in {', '.join(differing)}")
        else:
            notes.append(f"{name} has seed {run.seed} twice: {other.where} is left out for the newer {run.where}")
    return [newest[seed] for seed in sorted(newest)], notes, faults


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
