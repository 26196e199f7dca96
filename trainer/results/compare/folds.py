"""Runs of a cross-validation: the predictions of all folds of a seed put together, and what is missing.

Legend: N samples of all folds, F folds, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.folds import fold_order
from trainer.distributed.messages import join_truncated
from trainer.results.compare.sources.compared_run import Answers, ComparedRun
from trainer.results.compare.statistics import over_folds


@dataclass(frozen=True)
class FoldScores:
    """A metric on each fold (its mean over seeds), their mean, standard deviation and corrected t interval."""

    names: list[str]
    values: list[float | None]
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


def fold_name(run: ComparedRun) -> str | None:
    """The fold that the run tested."""
    return None if run.fold is None else run.fold["name"]


def tested_per_trained(runs: Sequence[ComparedRun]) -> float:
    """Samples tested over samples trained on, the mean over the runs; 0 of runs without folds."""
    ratios = [run.fold["test"] / run.fold["train"] for run in runs if run.fold is not None]
    return float(np.mean(ratios)) if ratios else 0.0


def pool_folds(name: str, runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], list[str], list[str]]:
    """One run per seed with the predictions of all folds, each sample once; notes, and faults.

    `runs` are those of the group `name`, one for each fold and seed. A seed that lacks a fold which another one has is left
    out, with a note: its score would be that of other samples. A split of which folds share samples is not kept; that the test
    splits do is a fault.
    """
    if all(run.fold is None for run in runs):
        return list(runs), [], []
    if any(run.fold is None for run in runs):
        without = join_truncated([run.where for run in runs if run.fold is None])
        return [], [], [f"{name}: some runs are of a fold, and some of none: {without}"]
    by_seed: dict[int, dict[str, ComparedRun]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[str(fold_name(run))] = run
    folds = sorted({fold for one in by_seed.values() for fold in one}, key=fold_order)
    known = list(dict.fromkeys(fold for run in runs if run.fold is not None for fold in run.fold["names"]))
    notes, faults, pooled = [], [], []
    if missing := [fold for fold in known if fold not in folds]:
        notes.append(
            f"{name} lacks {_folds(missing)}: its scores are those of the samples of {_folds(folds)} only ({len(folds)} of {len(known)})"
        )
    for seed in sorted(by_seed):
        absent = [fold for fold in folds if fold not in by_seed[seed]]
        if absent:
            notes.append(f"{name}, seed {seed} is left out: it lacks {_folds(absent)}, which other seeds have")
            continue
        try:
            pooled.append(_pooled(name, seed, [by_seed[seed][fold] for fold in folds]))
        except ValueError as error:
            faults.append(str(error))
    if not pooled and not faults:
        lacking = "; ".join(
            f"seed {seed} lacks {_folds([fold for fold in folds if fold not in by_seed[seed]])}"
            for seed in sorted(by_seed)
        )
        faults.append(f"{name}: no seed has all folds ({lacking}): train those, or leave the seeds or folds out")
    return pooled, notes, faults


def _pooled(name: str, seed: int, runs: Sequence[ComparedRun]) -> ComparedRun:
    """The runs of all folds as one.

    Raises:
        ValueError: their test splits share samples.
    """
    answers: dict[str, dict[str, Answers]] = {}
    for split in runs[0].answers:
        together = {task: _concatenated(runs, split, task) for task in runs[0].answers[split]}
        repeated = [one for one in together.values() if len(set(one.ids_N.tolist())) < len(one.ids_N)]
        if repeated and split == "test":
            where = join_truncated([run.where for run in runs])
            raise ValueError(
                f"{_called(name, seed, runs)}: folds share test samples, so they are not folds of one dataset: {where}"
            )
        if not repeated:
            answers[split] = together
    seeded = "" if runs[0].baseline is not None else f" with seed {seed}"
    where = f"the {len(runs)} folds of {name}{seeded}"
    return replace(runs[0], name=_called(name, seed, runs), where=where, answers=answers, mlflow=None)


def _called(name: str, seed: int, runs: Sequence[ComparedRun]) -> str:
    """A group's name with the seed, which baselines do not have."""
    return name if runs[0].baseline is not None else f"{name}, seed {seed}"


def _concatenated(runs: Sequence[ComparedRun], split: str, task: str) -> Answers:
    parts = [run.answers[split][task] for run in runs]
    ids = np.concatenate([part.ids_N for part in parts])
    order = np.argsort(ids, kind="stable")
    kinds = None
    if any(part.kind_N is not None for part in parts):
        kinds = np.concatenate([np.full(len(p.ids_N), None, object) if p.kind_N is None else p.kind_N for p in parts])[
            order
        ]
    folds = np.concatenate(
        [np.full(len(part.ids_N), fold_name(run), object) for run, part in zip(runs, parts, strict=True)]
    )
    truth, guess = (np.concatenate([getattr(part, key) for part in parts])[order] for key in ("truth_N", "guess_N"))
    return Answers(ids[order], truth, guess, kinds, folds[order])


def folds_of(answers: Answers) -> list[str]:
    """The folds of the samples, in order; empty where there are none."""
    return [] if answers.fold_N is None else sorted(set(answers.fold_N.tolist()), key=fold_order)


def only_folds(answers: Answers, folds: Sequence[str]) -> Answers:
    """The answers to the samples of these folds."""
    assert answers.fold_N is not None
    keep = np.isin(answers.fold_N.astype(str), list(folds))
    kinds = None if answers.kind_N is None else answers.kind_N[keep]
    return Answers(answers.ids_N[keep], answers.truth_N[keep], answers.guess_N[keep], kinds, answers.fold_N[keep])


def score_folds(
    answers: Sequence[Answers],
    chosen: Sequence[np.ndarray],
    value: Callable[[int, np.ndarray], float],
    ratio: float,
    level: float,
) -> FoldScores | None:
    """A metric fold by fold; None without folds.

    Args:
        answers: of each seed.
        chosen: of each seed, the samples that are looked at.
        value: the metric of a seed's answers to some samples.
        ratio: see :func:`tested_per_trained`.
    """
    names = folds_of(answers[0])
    if not names:
        return None
    values_F = fold_values(answers, chosen, value)
    found = over_folds(values_F, ratio, level)
    listed = [None if np.isnan(v) else float(v) for v in values_F]
    return FoldScores(names, listed, found.mean, found.sd, found.low, found.high)


def fold_values(
    answers: Sequence[Answers], chosen: Sequence[np.ndarray], value: Callable[[int, np.ndarray], float]
) -> np.ndarray:
    """[F]: the mean over seeds of a metric on each fold; see :func:`score_folds`."""
    return np.array(
        [
            np.mean([value(s, chosen[s] & np.asarray(one.fold_N == fold)) for s, one in enumerate(answers)])
            for fold in folds_of(answers[0])
        ]
    )


def _folds(names: Sequence[str]) -> str:
    return f"fold{'s' if len(names) > 1 else ''} {', '.join(names)}"
