"""The tables of a suite: scores by kind of evidence, differences to the full model, gate weights by kind, published values.

Everything is on the test split; checkpoints were chosen on validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from trainer.results.analysis import analyse
from trainer.results.compare.comparison import compare
from trainer.results.compare.result import EVERY, Comparison, Difference, Score
from trainer.results.compare.sources.compared_run import ComparedRun
from trainer.results.compare.sources.from_folders import run_from_folder
from trainer.results.printable import Table
from trainer.results.run_folder import read_run

FULL, DROP = 0.90, 0.10  # expected: score of the baseline on every kind; loss on its kind when an expert is removed

GateWeights = dict[str, dict[str, dict[str, list[float]]]]  # variant -> kind -> expert -> mean weight, one per seed


@dataclass(frozen=True)
class Claim:
    """An expectation, the finding, and whether the finding meets it (None: undecided)."""

    expected: str
    found: str
    met: bool | None


@dataclass
class SuiteTables:
    """The tables of a suite, its claims, notes, and the numbers behind the tables as JSON values."""

    tables: list[Table]
    claims: list[Claim]
    notes: list[str]
    values: dict[str, object] = field(default_factory=dict)


def evidence_tables(
    runs: Mapping[str, Sequence[Path]], baseline: str, evidence: Mapping[str, tuple[str, str]], *, level: float = 0.95
) -> SuiteTables:
    """The tables of variants on data with kinds of evidence.

    Args:
        runs: variant -> finished run folders, one per seed.
        baseline: the variant with which the others are compared, paired by seed and sample.
        evidence: kind -> (the expert that it needs, the variant without that expert).

    Raises:
        ValueError: the runs cannot be compared.
    """
    compared = compare(_compared(runs), baseline=baseline, kinds=True, level=level)
    (task, metrics), *others = compared.tested.items()
    if others:
        raise ValueError(f"a suite with a baseline is about one task, not {', '.join(compared.tested)}")
    metric = metrics[0]
    kinds = [EVERY, *(kind for kind in evidence if kind in compared.kinds[task])]
    kinds += [kind for kind in compared.kinds[task] if kind not in kinds]
    gates = gate_weights(runs)
    return SuiteTables(
        [
            _score_table(compared, task, metric, kinds),
            _difference_table(compared, task, metric, kinds, baseline),
            *([_gate_table(gates)] if gates else []),
        ],
        _claims(compared, task, metric, gates.get(baseline, {}), baseline, evidence),
        compared.notes,
        {
            "task": task,
            "metric": metric,
            "level": level,
            "scores": [asdict(score) for score in compared.scores if score.metric == metric],
            "differences": [asdict(difference) for difference in compared.differences],
            "gates": gates,
        },
    )


def published_tables(
    runs: Mapping[str, Sequence[Path]], published: Mapping[str, tuple[str, float, str]], *, level: float = 0.95
) -> SuiteTables:
    """Each variant beside its published value: `published` is variant -> (metric, value, the source's name of the metric).

    Raises:
        ValueError: the runs of a variant cannot be read together.
    """
    columns = ["benchmark", "metric", "published", "here, mean ± sd", f"{level:.0%} interval of the mean", "seeds"]
    table = Table("Beside the paper's table", columns)
    values, notes = [], []
    for variant, (metric, value, source_name) in published.items():
        if not runs.get(variant):
            table.rows.append([variant, metric, f"{value:.4f}", "not run", "", "0"])
            continue
        compared = compare(_compared({variant: runs[variant]}), level=level)
        score = compared.score(next(iter(compared.tested)), variant, metric)
        interval = "" if score.low is None or score.high is None else f"{score.low:.4f} to {score.high:.4f}"
        table.rows.append([variant, metric, f"{value:.4f}", _mean(score), interval, str(len(score.seeds))])
        values.append({"published": value, "called": source_name, **asdict(score)})
        notes += [f"{variant}: {note}" for note in compared.notes]
    table.note = "The paper's names: " + "; ".join(
        f"{variant}: {source_name}" for variant, (_, _, source_name) in published.items()
    )
    return SuiteTables([table], [], notes, {"level": level, "scores": values})


def multitask_tables(
    runs: Mapping[str, Sequence[Path]],
    multitask: str,
    single: Mapping[str, tuple[str, str]],
    *,
    tolerance: float,
    level: float = 0.95,
) -> SuiteTables:
    """One model of several tasks beside a model of each task.

    Args:
        runs: variant -> finished run folders, one per seed.
        multitask: the variant of all tasks.
        single: task -> (the variant of that task only, the metric, of which more is better).
        tolerance: by how much the multi-task mean over seeds may be lower.

    Raises:
        ValueError: the runs of a task cannot be compared.
    """
    table = Table(
        "One model of all tasks, and one of each",
        ["task", "metric", "single-task", "multi-task", "difference", "seeds"],
    )
    claims, notes, values = [], [], []
    for task, (variant, metric) in single.items():
        expectation = f"{multitask} loses at most {tolerance:.2f} on {task}"
        if not runs.get(variant) or not runs.get(multitask):
            table.rows.append([task, metric, *["not run"] * 3, "0"])
            claims.append(Claim(expectation, "not run", None))
            continue
        both = _compared({variant: runs[variant], multitask: runs[multitask]})
        compared = compare(both, task=task, metrics=[metric], baseline=variant, level=level)
        scores = [compared.score(task, name, metric) for name in (variant, multitask)]
        (difference,) = (d for d in compared.differences if d.kind == EVERY)
        found = _difference(difference)
        table.rows.append([task, metric, *map(_mean, scores), found, str(len(difference.seeds))])
        met = None if difference.value is None else difference.value >= -tolerance
        claims.append(Claim(expectation, found, met))
        notes += [f"{task}: {note}" for note in compared.notes]
        values.append({"scores": [asdict(score) for score in scores], "difference": asdict(difference)})
    table.note = f"Mean ± standard deviation over seeds; the difference with its {level:.0%} interval, paired by seed and sample."
    return SuiteTables([table], claims, notes, {"level": level, "tasks": values})


def gate_weights(runs: Mapping[str, Sequence[Path]]) -> GateWeights:
    """Mean weight of each expert over the samples of each kind, of every run that has a gate."""
    weights: GateWeights = {}
    for variant, paths in runs.items():
        for path in paths:
            for result in analyse(read_run(path)):
                for group in result.gates.groups.get("kind", []) if result.gates is not None else []:
                    of_kind = weights.setdefault(variant, {}).setdefault(group.name, {})
                    for expert, weight in group.expert.items():
                        of_kind.setdefault(expert, []).append(weight)
    return weights


def _compared(runs: Mapping[str, Sequence[Path]]) -> list[ComparedRun]:
    return [replace(run_from_folder(path), group=variant) for variant, paths in runs.items() for path in paths]


def _score_table(compared: Comparison, task: str, metric: str, kinds: Sequence[str]) -> Table:
    table = Table(
        f"{metric} by kind of evidence, {compared.split}: mean ± standard deviation over seeds", ["", *kinds, "seeds"]
    )
    for group in compared.groups:
        scores = [compared.score(task, group.name, metric, kind) for kind in kinds]
        table.rows.append([group.name, *map(_mean, scores), str(len(group.runs))])
    counts = [f"{kind} {compared.score(task, compared.groups[0].name, metric, kind).n}" for kind in kinds]
    table.note = f"Samples: {', '.join(counts)}."
    return table


def _difference_table(compared: Comparison, task: str, metric: str, kinds: Sequence[str], baseline: str) -> Table:
    table = Table(f"Difference of {metric} to {baseline}, with {compared.level:.0%} interval", ["", *kinds])
    by_place = {(d.group, d.kind): d for d in compared.differences if d.metric == metric and d.task == task}
    for group in compared.groups:
        if group.name != baseline:
            table.rows.append([group.name, *(_difference(by_place.get((group.name, kind))) for kind in kinds)])
    table.note = (
        "Paired by seed and sample; the interval is for new seeds and new samples (docs/compare.md). "
        f"*: p of the difference, corrected for all of this table ({compared.correction}), is at most {1 - compared.level:.2g}."
    )
    return table


def _gate_table(gates: GateWeights) -> Table:
    experts = list(dict.fromkeys(e for kinds in gates.values() for weights in kinds.values() for e in weights))
    table = Table("Mean weight of each expert at the gate, by kind of evidence", ["", "kind", *experts])
    for variant, kinds in gates.items():
        for kind, weights in kinds.items():
            table.rows.append([variant, kind, *(_weight(weights.get(expert)) for expert in experts)])
    table.note = "Mean over the samples of the kind, ± standard deviation over seeds."
    return table


def _claims(
    compared: Comparison, task: str, metric: str, gates: Mapping[str, Mapping[str, list[float]]], baseline: str,
    evidence: Mapping[str, tuple[str, str]],
) -> list[Claim]:  # fmt: skip
    """The three expectations of each kind of evidence."""
    claims = []
    for kind, (expert, without) in evidence.items():
        if kind not in compared.kinds[task]:
            continue
        mean = compared.score(task, baseline, metric, kind).mean
        met = None if mean is None else mean >= FULL
        found = "undefined" if mean is None else f"{mean:.3f}"
        claims.append(Claim(f"{baseline} reaches {FULL:.2f} on {kind}", found, met))
        differences = (d for d in compared.differences if (d.group, d.metric, d.kind) == (without, metric, kind))
        drop = next(differences, None)
        met = None
        if drop is not None and drop.value is not None and drop.high is not None:
            met = drop.value <= -DROP and drop.high < 0
        claims.append(Claim(f"{without} loses {DROP:.2f} on {kind}, the interval below 0", _difference(drop), met))
        weights = {name: float(np.mean(per_seed)) for name, per_seed in gates.get(kind, {}).items()}
        found = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()) or "no gate"
        met = max(weights, key=lambda name: weights[name]) == expert if weights else None
        claims.append(Claim(f"the gate of {baseline} weighs {expert} most on {kind}", found, met))
    return claims


def _mean(score: Score) -> str:
    if score.mean is None:
        return "undefined"
    return f"{score.mean:.3f}" + (f" ± {score.sd:.3f}" if score.sd is not None else "")


def _difference(difference: Difference | None) -> str:
    if difference is None or difference.value is None:
        return "unknown"
    mark = "*" if difference.significant else ""
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.3f}"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{mark}"


def _weight(per_seed: list[float] | None) -> str:
    if not per_seed:
        return "-"
    return f"{np.mean(per_seed):.2f}" + (f" ± {np.std(per_seed, ddof=1):.2f}" if len(per_seed) > 1 else "")
