"""Groups of runs to compare: runs that differ only in their seed, or that the caller puts together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from trainer.checkpoint.identity import effect_of
from trainer.data.folds import fold_order
from trainer.distributed.messages import group_by_value
from trainer.results.compare.folds import fold_name, pool_folds
from trainer.results.compare.sources.compared_run import ComparedRun

FOLDS_HINT = (
    "Folds of one dataset are prepared as one dataset whose samples have a fold, and trained with egmf sweep CONFIG --folds "
    "(docs/sweeps.md)"
)
LONG = 60  # characters of a group's name, beyond which the runs' common name is tried


@dataclass
class Group:
    """Runs that are the same but for their seed and fold; `settings` are those that differ between the groups.

    `per_seed` holds one run for each seed: the runs themselves, or the runs of all folds as one (:func:`pool_folds`).
    A baseline is a group of its own, without settings and seeds, whose `per_seed` is that one, of folds all as one; `baseline` is its name.
    """

    name: str
    settings: dict[str, str | None]
    runs: list[ComparedRun]
    per_seed: list[ComparedRun] = field(default_factory=list)
    baseline: str | None = None

    @property
    def seeds(self) -> list[int]:
        return [] if self.baseline is not None else [run.seed for run in self.per_seed]

    def runs_by_seed(self) -> list[list[ComparedRun]]:
        """The runs of each seed, which are several where there are folds."""
        return [[run for run in self.runs if run.seed == one.seed] for one in self.per_seed]

    @property
    def devices(self) -> list[str]:
        return sorted({run.cost.device for run in self.runs if run.cost.device})

    def cost(self) -> tuple[float | None, str | None]:
        """Mean core-hours or GPU-hours of a run, and the unit; None where a run's are unknown or both units occur."""
        amounts = [run.cost.amount for run in self.runs]
        units = {run.cost.unit for run in self.runs}
        known = [amount for amount in amounts if amount is not None]
        if len(known) < len(amounts) or len(units) != 1:
            return None, None
        return sum(known) / len(known), units.pop()

    def speed(self) -> float | None:
        """Mean over runs of their training samples per second; None where one is unknown."""
        speeds = [run.cost.samples_per_second for run in self.runs]
        known = [speed for speed in speeds if speed is not None]
        return sum(known) / len(known) if known and len(known) == len(speeds) else None


def group_runs(runs: Sequence[ComparedRun], by: Sequence[str] = ()) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, baselines last, and notes: what else differs inside a group, and which runs are left out.

    Runs are grouped by :attr:`ComparedRun.group` if all have one, else by the settings `by`, else by all that vary.

    Raises:
        ValueError: a setting that no run has, with the nearest name; a group with two configs for one seed, or folds that do not fit together.
    """
    baselines = [run for run in runs if run.baseline is not None]
    runs = [run for run in runs if run.baseline is None]
    known = list(dict.fromkeys(key for run in runs for key in run.config))
    varying = [key for key in known if _varies(key, runs) and not _irrelevant(key)]
    keys = _matching_settings(by, known) if by else varying
    given = all(run.group is not None for run in runs)
    members_by = group_by_value(
        (run, str(run.group) if given else tuple(run.config.get(key) for key in keys)) for run in runs
    )
    reported = [key for key in (varying if given else keys) if _varies(key, runs)]
    names = [str(group) for group in members_by] if given else _group_names(list(members_by.values()), reported)
    groups: list[Group] = []
    notes: list[str] = []
    faults: list[str] = []
    unfit: list[str] = []
    for name, members in zip(names, members_by.values(), strict=True):
        kept, dropped, conflicting = _one_run_a_seed(name, members, varying)
        notes += dropped
        faults += conflicting
        if conflicting:
            continue
        per_seed, lacking, of_folds = pool_folds(name, kept)
        notes += lacking
        unfit += of_folds
        inside = [key for key in varying if _varies(key, kept)]
        if inside:
            notes.append(f"the runs of {name} differ in more than their seed: {', '.join(inside)}")
        settings = {key: kept[0].config.get(key) if key not in inside else "(differs)" for key in reported}
        groups.append(Group(name, settings, kept, per_seed))
    if faults:
        cure = "give such runs groups of their own" if given else "add these settings to --group-by too"
        raise ValueError(
            "\n  ".join([f"a group has several runs of one seed with different settings: {cure}", *faults])
        )
    if unfit:
        raise ValueError("\n  ".join(["the runs of folds do not fit together", *unfit]))
    of_baselines, dropped, unfit = _baseline_groups(baselines, {group.name for group in groups})
    if unfit:
        raise ValueError("\n  ".join(["the baselines of folds do not fit together", *unfit]))
    return groups + of_baselines, notes + dropped


def _baseline_groups(
    baselines: Sequence[ComparedRun], taken: Collection[str]
) -> tuple[list[Group], list[str], list[str]]:
    """A group for each baseline, notes, and faults; of several with one name and fold the newest counts. `taken` are names of other groups."""
    newest: dict[str, dict[str | None, ComparedRun]] = {}
    notes, faults = [], []
    for run in baselines:
        name = run.group or f"baseline {run.baseline}"
        if name in taken:
            name = f"{name} ({run.where if run.fold is None else 'of folds'})"
        of_folds = newest.setdefault(name, {})
        other = of_folds.get(fold_name(run))
        if other is not None:
            older, run = sorted((other, run), key=lambda one: one.started)
            notes.append(f"there is {name}{_of_fold(run)} twice: {older.where} is left out for the newer {run.where}")
        of_folds[fold_name(run)] = run
    groups = []
    for name, by_fold in newest.items():
        runs = [by_fold[fold] for fold in sorted(by_fold, key=lambda fold: fold_order(fold or ""))]
        per_seed, lacking, unfit = pool_folds(name, runs)
        notes += lacking
        faults += unfit
        groups.append(Group(name, {}, runs, per_seed, runs[0].baseline))
    return groups, notes, faults


def _varies(key: str, runs: Sequence[ComparedRun]) -> bool:
    return len({run.config.get(key) for run in runs}) > 1


def _irrelevant(key: str) -> bool:
    """Whether runs that differ only in this setting are one group: it affects paths, memory or records, not results."""
    return key in ("train.seed", "data.fold") or effect_of(key) in ("execution", "record")


def _matching_settings(by: Sequence[str], known: Sequence[str]) -> list[str]:
    """The settings that `by` lists, one by one or as sections.

    Raises:
        ValueError: one that no run has.
    """
    keys, faults = [], []
    for name in by:
        matching = [key for key in known if key == name or key.startswith(f"{name}.")]
        if not matching:
            close = difflib.get_close_matches(name, known, n=1)
            faults.append(f"no run has the setting {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        keys += matching
    if faults:
        raise ValueError("\n  ".join(["--group-by:", *faults]))
    return list(dict.fromkeys(keys))


def _group_names(groups: Sequence[Sequence[ComparedRun]], keys: Sequence[str]) -> list[str]:
    """The differing settings in short; where there are none or many, the runs' common name, if each group has its own."""
    ends = [key.rpartition(".")[2] for key in keys]
    short = [
        end if ends.count(end) == 1 else ".".join(key.split(".")[-2:]) for key, end in zip(keys, ends, strict=True)
    ]
    names = [
        ", ".join(f"{s}={_unquoted(members[0].config.get(k))}" for s, k in zip(short, keys, strict=True))
        for members in groups
    ]
    if len(keys) and max(map(len, names)) <= LONG:
        return names
    stems = [{_stem(run) for run in members} for members in groups]
    common = [stem.pop() for stem in stems if len(stem) == 1]
    return (
        common
        if len(set(common)) == len(groups)
        else [f"{i}: {name}" if name else f"group {i}" for i, name in enumerate(names, 1)]
    )


def _stem(run: ComparedRun) -> str:
    """A run's name without seed and fold."""
    stem = re.sub(r"[-_/. ]?(s|seed)[-_]?\d+$", "", run.name)
    if run.fold is not None:
        stem = re.sub(rf"(^|[-_/., ])fold[-_=]?({re.escape(run.fold['name'])}|[^-_/,]*)", "", stem)
    return stem or "runs"


def _unquoted(text: str | None) -> str:
    return "(absent)" if text is None else re.sub(r"['\"]", "", text)


def _one_run_a_seed(
    name: str, members: Sequence[ComparedRun], varying: Sequence[str]
) -> tuple[list[ComparedRun], list[str], list[str]]:
    """Of runs with one seed, fold and config the newest, whatever its scores; notes on those dropped, faults where configs differ."""
    newest: dict[tuple[int, str | None], ComparedRun] = {}
    notes, faults = [], []
    other_data: list[ComparedRun] = []
    for run in sorted(members, key=lambda run: run.started):
        place = (run.seed, fold_name(run))
        other = newest.get(place)
        newest[place] = run
        if other is None:
            continue
        differing = [key for key in varying if run.config.get(key) != other.config.get(key)]
        if differing:
            faults.append(
                f"{name}, seed {run.seed}{_of_fold(run)}: {other.where} and {run.where} differ in {', '.join(differing)}"
            )
        elif run.fingerprints != other.fingerprints:
            other_data.append(other)
        else:
            notes.append(
                f"{name} has seed {run.seed}{_of_fold(run)} twice: {other.where} is left out for the newer {run.where}"
            )
    order = sorted(newest, key=lambda place: (place[0], fold_order(place[1] or "")))
    kept = [newest[place] for place in order]
    if other_data:
        notes.append(_left_out(name, kept, other_data))
    return kept, notes, faults


def _left_out(name: str, kept: Sequence[ComparedRun], left: Sequence[ComparedRun]) -> str:
    """A warning that names every run which is left out for one of its seed on other data."""

    def listed(runs: Sequence[ComparedRun]) -> str:
        return ", ".join(f"{run.where} (data {run.config.get('data.path', 'unknown')})" for run in runs)

    return (
        f"WARNING: {name} has runs of one seed on different data, of which only the newest counts: {len(left)} LEFT OUT: {listed(left)}; "
        f"kept: {listed(kept)}. {FOLDS_HINT}"
    )


def _of_fold(run: ComparedRun) -> str:
    return "" if run.fold is None else f" of fold {fold_name(run)}"
