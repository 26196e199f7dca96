"""A comparison as tables of text (terminal and page), one JSON object, CSV and LaTeX. Undefined values stay empty."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from trainer.results.compare.differences import number_of_tests
from trainer.results.compare.folds import FoldScores, fold_name
from trainer.results.compare.groups import Group
from trainer.results.compare.power import MOST, POWER
from trainer.results.compare.result import EVERY, Comparison, Difference, Score
from trainer.results.printable import Table, printable, rich_table

MISSING = "—"
SHOWN_FOLDS = 10  # folds up to which each has a column
NAMES = ("task", "metric", "kind", "group", "baseline", "folds")  # columns of the CSV with words of users
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # with which spreadsheets let a formula begin
SMALLEST_P = 1e-4  # a smaller p is written as less than it
CORRECTIONS = {
    "holm": "by Holm's method for all differences shown",
    "bh": "by Benjamini and Hochberg's method for all differences shown",
    "none": "not corrected for their number",
}


def tables(comparison: Comparison) -> list[Table]:
    """All tables of a comparison."""
    out = [group_scores(comparison, task) for task in comparison.tasks]
    out += [
        table
        for task in comparison.tasks
        for table in (fold_scores(comparison, task), kind_scores(comparison, task))
        if table
    ]
    out += [table for table in (differences(comparison), settings(comparison), costs(comparison)) if table]
    return out


def group_scores(comparison: Comparison, task: str) -> Table:
    """A row per group: every metric's mean ± standard deviation over seeds; the interval of those that are tested."""
    by_place = {(s.group, s.metric): s for s in comparison.scores if s.task == task and s.kind == EVERY}
    metrics, tested = comparison.tasks[task], comparison.tested[task]
    invalid = any(comparison.invalid_rate[task, group.name] for group in comparison.groups)
    heads = [
        f"{m}{f', {comparison.level:.0%} interval' if interval else ''}" for m, interval in _columns(metrics, tested)
    ]
    valid = next(iter(comparison.validation.values()), None)
    sorts = [f"valid {valid.metric}"] if valid else []
    sizes = {group.name: by_place[group.name, metrics[0]].n for group in comparison.groups}
    alike = len(set(sizes.values())) == 1
    folds = {len(score.folds.names) for score in by_place.values() if score.folds is not None}
    table = Table(
        f"{task}, {comparison.split}"
        + (f": {next(iter(sizes.values()))} samples" if alike else "")
        + (f", {' or '.join(map(str, sorted(folds)))} folds together" if folds else ""),
        ["group", "seeds", *([] if alike else ["samples"]), *sorts, *heads, *(["invalid"] if invalid else [])],
    )
    for group in comparison.groups:
        row = [group.name, str(len(group.seeds) or MISSING), *([] if alike else [str(sizes[group.name])])]
        row += [mean_sd(comparison.validation[group.name])] if valid else []
        for metric, interval in _columns(metrics, tested):
            score = by_place[group.name, metric]
            row.append(span(score.low, score.high) if interval else mean_sd(score))
        table.rows.append([*row, *([number(comparison.invalid_rate[task, group.name])] if invalid else [])])
    table.note = (
        f"Mean ± sample standard deviation over seeds; intervals are those of the mean over seeds (Student's t), on this {comparison.split} "
        f"split as it is. {MISSING}: undefined, or unknown with one seed."
        + (" Of a cross-validation: the predictions of all folds together, each sample once." if folds else "")
        + (" A baseline is fitted once, without a seed." if comparison.baselines else "")
    )
    return table


def fold_scores(comparison: Comparison, task: str) -> Table | None:
    """Every metric's mean ± standard deviation over the folds of a cross-validation; those that are tested fold by fold too."""
    of_folds = [s for s in comparison.scores if s.task == task and s.kind == EVERY and s.folds is not None]
    if not of_folds:
        return None
    by_place = {(s.group, s.metric): s.folds for s in of_folds}
    names = list(dict.fromkeys(name for s in of_folds if s.folds for name in s.folds.names))
    metrics, tested = comparison.tasks[task], comparison.tested[task]
    each = tested if len(names) <= SHOWN_FOLDS else []
    heads = [
        f"{m}{f', {comparison.level:.0%} interval' if interval else ''}" for m, interval in _columns(metrics, tested)
    ]
    table = Table(
        f"{task}, {comparison.split}: over folds",
        ["group", "folds", *heads, *(f"{m}, fold {name}" for m in each for name in names)],
    )
    for group in comparison.groups:
        if (group.name, metrics[0]) not in by_place:
            continue
        row = [group.name, str(len(_folds(by_place, group, metrics[0]).names))]
        for metric, interval in _columns(metrics, tested):
            found = _folds(by_place, group, metric)
            row.append(span(found.low, found.high) if interval else mean_sd(found))
        for metric in each:
            values = dict(
                zip(_folds(by_place, group, metric).names, _folds(by_place, group, metric).values, strict=True)
            )
            row += [number(values.get(name)) for name in names]
        table.rows.append(row)
    table.note = (
        "Mean ± sample standard deviation over folds, each fold's value the mean over its seeds. Folds share training data, so their deviation "
        "understates that of new data: the intervals are Nadeau and Bengio's (2003), wider for it, and still an approximation."
    )
    return table


def _folds(by_place: Mapping[tuple[str, str], FoldScores | None], group: Group, metric: str) -> FoldScores:
    found = by_place[group.name, metric]
    assert found is not None
    return found


def kind_scores(comparison: Comparison, task: str) -> Table | None:
    """The tested metrics by kind of sample."""
    kinds = comparison.kinds.get(task, [EVERY])
    if kinds == [EVERY]:
        return None
    by_place = {(s.group, s.metric, s.kind): s for s in comparison.scores if s.task == task}
    columns = [(metric, kind) for metric in comparison.tested[task] for kind in kinds]
    table = Table(f"{task}, {comparison.split}, by kind", ["group", *(f"{metric}, {kind}" for metric, kind in columns)])
    table.rows = [[g.name, *(mean_sd(by_place[g.name, m, k]) for m, k in columns)] for g in comparison.groups]
    return table


def differences(comparison: Comparison) -> Table | None:
    if not comparison.differences:
        return None
    tasks, kinds = len(comparison.tasks) > 1, any(d.kind != EVERY for d in comparison.differences)
    heads = [*(["task"] if tasks else []), "metric", *(["kind"] if kinds else []), "seeds", "difference"]
    table = Table(
        f"Differences{f' from {comparison.baseline}' if comparison.baseline else ' between groups'}",
        [
            "group − baseline" if comparison.baseline is None else "group",
            *heads,
            f"{comparison.level:.0%} interval",
            "p",
            "p corrected",
            "significant",
            f"seeds for {POWER:.0%}",
        ],
    )
    for d in comparison.differences:
        row = [
            d.group if comparison.baseline else f"{d.group} − {d.baseline}",
            *([d.task] if tasks else []),
            d.metric,
            *([d.kind] if kinds else []),
        ]
        seeds = MISSING if {d.group, d.baseline} <= comparison.baselines else str(len(d.seeds))
        row += [seeds, signed(d.value), span(d.low, d.high, sign=True), p_value(d.p)]
        table.rows.append([*row, p_value(d.p_corrected), verdict(d), seeds_cell(d)])
    less = [name for name in comparison.less_is_better if any(d.metric == name for d in comparison.differences)]
    table.note = (
        f"Paired by seed and sample{_baseline_note(comparison)}. Intervals and p: bootstrap over samples together with the variance over seeds; p of an accuracy: the "
        f"larger of that and McNemar's exact test{_fold_note(comparison)}. p corrected: {CORRECTIONS[comparison.correction]}; significant: it is at most {1 - comparison.level:.2g}. "
        f"Seeds for {POWER:.0%}: how many would make a difference of the observed size, with the observed deviation over seeds, significant in {POWER:.0%} "
        f"of comparisons, at {1 - comparison.level:.2g}{f' / {number_of_tests(comparison)}' if number_of_tests(comparison) > 1 else ''}; or what it needs instead, since more seeds alone would not do."
        + (f" Less is better of {', '.join(less)}." if less else "")
    )
    return table


def _baseline_note(comparison: Comparison) -> str:
    return "; a baseline by sample, with every seed of the other group" if comparison.baselines else ""


def _fold_note(comparison: Comparison) -> str:
    folded = any(d.p_folds is not None for d in comparison.differences)
    return "; of a cross-validation, the larger of these and the corrected t test over folds" if folded else ""


def settings(comparison: Comparison) -> Table | None:
    """The settings that differ between the groups of runs."""
    if not comparison.differing:
        return None
    names = [group.name for group in comparison.groups if group.baseline is None]
    table = Table("Settings that differ", ["setting", *names], words=True)
    if len(names) > len(comparison.differing):
        table.columns = ["group", *comparison.differing]
        table.rows = [[name, *(_setting(v[name]) for v in comparison.differing.values())] for name in names]
    else:
        table.rows = [[k, *(_setting(v[name]) for name in names)] for k, v in comparison.differing.items()]
    return table


def costs(comparison: Comparison) -> Table:
    table = Table("Cost", ["group", "seeds", "hours × processes, per run", "all runs", "samples/s", "device"])
    for group in comparison.groups:
        amount, unit = group.cost()
        one = all_runs = speed = MISSING
        if amount is not None:
            one, all_runs = f"{amount:.3g} {unit}", f"{amount * len(group.runs):.3g} {unit}"
        if (samples_per_second := group.speed()) is not None:
            speed = f"{samples_per_second:.1f}"
        seeds, devices = ", ".join(map(str, group.seeds)) or MISSING, ", ".join(group.devices) or MISSING
        table.rows.append([group.name, seeds, one, all_runs, speed, devices])
    table.note = (
        "From a run's start to its end, evaluation included (in run folders: of its last part, where it was continued); on CPUs multiplied by "
        "the threads of each process. Samples per second: the median over the training's steps."
    )
    return table


def terminal(comparison: Comparison) -> RenderableType:
    """All tables and notes, for the terminal."""
    parts: list[RenderableType] = []
    for table in tables(comparison):
        note = [Text(printable(table.note), style="dim")] if table.note else []
        parts.append(Padding(Renderables(rich_table(table), *note), (0, 0, 1, 0)))
    parts += [Text(f"note: {printable(note)}", style="yellow") for note in comparison.notes]
    return Renderables(*parts)


def as_json(comparison: Comparison) -> dict[str, object]:
    """The whole comparison as JSON values; undefined is None."""
    return {
        "split": comparison.split,
        "level": comparison.level,
        "correction": comparison.correction,
        "resamples": comparison.resamples,
        "baseline": comparison.baseline,
        "tasks": comparison.tasks,
        "tested": comparison.tested,
        "kinds": comparison.kinds,
        "groups": [_group_json(comparison, group) for group in comparison.groups],
        "scores": [asdict(score) for score in comparison.scores],
        "validation": [asdict(score) for score in comparison.validation.values()],
        "differences": [vars(difference) for difference in comparison.differences],
        "power": {"target": POWER, "tests": number_of_tests(comparison)},
        "differing": comparison.differing,
        "notes": comparison.notes,
    }


def _group_json(comparison: Comparison, group: Group) -> dict[str, object]:
    amount, unit = group.cost()
    runs = [
        {
            "name": run.name,
            "where": run.where,
            "seed": None if run.baseline is not None else run.seed,
            "fold": fold_name(run),
            "commit": run.commit,
            "fingerprints": run.fingerprints,
        }
        | {f"cost_{key}": value for key, value in vars(run.cost).items()}
        for run in group.runs
    ]
    return {
        "name": group.name,
        "baseline": group.baseline,
        "settings": group.settings,
        "seeds": group.seeds,
        "invalid_rate": {task: comparison.invalid_rate[task, group.name] for task in comparison.tasks},
        "cost": {"mean": amount, "unit": unit},
        "samples_per_second": group.speed(),
        "devices": group.devices,
        "runs": runs,
    }


def as_csv(comparison: Comparison) -> str:
    """A line per score and per difference; undefined values are empty cells.

    An apostrophe stands before text that a spreadsheet would take for a formula.
    """
    names = (
        "what", "task", "metric", "kind", "group", "baseline", "n", "seeds", "value", "sd", "low", "high", "p", "p_corrected", "seed_values", "folds", "fold_values", "p_folds",
        "seeds_needed", "seeds_limit",
    )  # fmt: skip
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for score in comparison.scores:
        seeds = " ".join(map(str, score.seeds))
        values = _listed(score.values)
        folds = (
            {"folds": " ".join(score.folds.names), "fold_values": _listed(score.folds.values)}
            if score.folds
            else {"folds": ""}
        )
        row = {**vars(score), "what": "score", "value": score.mean, "seeds": seeds, "seed_values": values, **folds}
        writer.writerow(_without_formulas(row))
    for difference in comparison.differences:
        seeds = " ".join(map(str, difference.seeds))
        folds = {"folds": " ".join(difference.folds), "fold_values": _listed(difference.fold_values)}
        writer.writerow(_without_formulas({**vars(difference), "what": "difference", "seeds": seeds, **folds}))
    return out.getvalue()


def _without_formulas(row: Mapping[str, Any]) -> dict[str, Any]:
    """The names in a row on one line, with an apostrophe before those that begin like a spreadsheet's formula."""
    names = {key: printable(value) for key, value in row.items() if key in NAMES and isinstance(value, str)}
    return {**row, **{key: f"'{name}" if name.strip().startswith(FORMULA) else name for key, name in names.items()}}


def _listed(values: Sequence[float | None]) -> str:
    return " ".join("" if v is None else repr(v) for v in values)


def as_tex(comparison: Comparison) -> str:
    """Tables of groups and differences for LaTeX with booktabs; no best value is bold, which would be selection on test."""
    parts = ["% needs \\usepackage{booktabs}"]
    chosen = [group_scores(comparison, task) for task in comparison.tasks]
    chosen += [table for task in comparison.tasks if (table := fold_scores(comparison, task))]
    chosen += [table for task in comparison.tasks if (table := kind_scores(comparison, task))]
    chosen += [table for table in [differences(comparison)] if table]
    parts += map(_tex_table, chosen)
    return "\n\n".join(parts) + "\n"


def _tex_table(table: Table) -> str:
    lines = ["\\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}", "\\toprule"]
    lines += [" & ".join(map(tex, table.columns)) + " \\\\", "\\midrule"]
    lines += [" & ".join(map(tex, row)) + " \\\\" for row in table.rows]
    return "\n".join([f"% {printable(table.title)}", *lines, "\\bottomrule", "\\end{tabular}"])


def tex(text: str) -> str:
    """`text` escaped for LaTeX's text mode, also where a bracket or star in front would be taken for an argument of the line before."""
    special = {
        "\\": "\\textbackslash{}", "|": "\\textbar{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "<": "$<$", ">": "$>$",
        "×": "$\\times$", "—": "--", "…": "\\ldots{}", **{c: f"\\{c}" for c in "&%$#_{}"},
    }  # fmt: skip
    plain = printable(text)
    start = "{}" if plain.lstrip().startswith(("[", "*")) else ""
    return start + "".join(special.get(c, c) for c in plain)


def _columns(metrics: list[str], tested: list[str]) -> list[tuple[str, bool]]:
    """(metric, whether it is the interval's column): an interval follows each tested metric."""
    return [(metric, interval) for metric in metrics for interval in ((False, True) if metric in tested else (False,))]


def mean_sd(score: Score | FoldScores) -> str:
    """Mean ± standard deviation; of a baseline, which has no seeds, its one value."""
    if isinstance(score, Score) and not score.seeds:
        return number(score.mean)
    return MISSING if score.mean is None else f"{number(score.mean)} ± {number(score.sd)}"


def span(low: float | None, high: float | None, *, sign: bool = False) -> str:
    show = signed if sign else number
    return MISSING if low is None or high is None else f"{show(low)} … {show(high)}"


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}".replace("-", "−")


def signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.4f}".replace("-", "−")


def p_value(p: float | None) -> str:
    return MISSING if p is None else f"<{SMALLEST_P:.4f}" if p < SMALLEST_P else f"{p:.4f}"


def verdict(d: Difference) -> str:
    return MISSING if d.significant is None else "yes" if d.significant else "no"


def seeds_cell(d: Difference) -> str:
    """How many seeds would tell the difference, or what is needed instead."""
    if d.seeds_needed is not None:
        return str(d.seeds_needed)
    if d.seeds_limit is None:
        return MISSING
    return {
        "one seed": "unknown",
        "samples": "needs samples",
        "folds": "needs folds",
        "many seeds": f">{MOST}",
        "no difference": MISSING,
    }[d.seeds_limit]


def _setting(value: str | None) -> str:
    return "(absent)" if value is None else value
