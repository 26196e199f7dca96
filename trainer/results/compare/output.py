"""A comparison as tables of text (terminal and page), one JSON object, CSV and LaTeX. What is missing stays missing."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from trainer.results.compare.comparison import EVERY, Comparison, Difference, Score
from trainer.results.compare.groups import Group
from trainer.results.printable import Table, printable, rich_table

MISSING = "—"
SMALLEST_P = 1e-4  # shown
TESTS = {
    "holm": "by Holm's method for all differences shown",
    "bh": "by Benjamini and Hochberg's method for all differences shown",
    "none": "not corrected for their number",
}


def tables(found: Comparison) -> list[Table]:
    """Everything a comparison says, table by table."""
    out = [group_scores(found, task) for task in found.tasks]
    out += [table for task in found.tasks if (table := kind_scores(found, task))]
    out += [table for table in (differences(found), settings(found), costs(found)) if table]
    return out


def group_scores(found: Comparison, task: str) -> Table:
    """A row per group: every metric's mean ± standard deviation over seeds; the interval of those that are tested."""
    by_place = {(s.group, s.metric): s for s in found.scores if s.task == task and s.kind == EVERY}
    metrics, tested = found.tasks[task], found.tested[task]
    invalid = any(found.invalid_rate[task, group.name] for group in found.groups)
    heads = [f"{m}{f', {found.level:.0%} interval' if interval else ''}" for m, interval in _columns(metrics, tested)]
    valid = next(iter(found.validation.values()), None)
    sorts = [f"valid {valid.metric}"] if valid else []
    n = next(score.n for score in by_place.values())
    table = Table(
        f"{task}, {found.split}: {n} samples", ["group", "seeds", *sorts, *heads, *(["invalid"] if invalid else [])]
    )
    for group in found.groups:
        row = [group.name, str(len(group.runs))]
        row += [_mean(found.validation[group.name])] if valid else []
        for metric, interval in _columns(metrics, tested):
            score = by_place[group.name, metric]
            row.append(span(score.low, score.high) if interval else _mean(score))
        table.rows.append([*row, *([number(found.invalid_rate[task, group.name])] if invalid else [])])
    table.note = (
        f"Mean ± sample standard deviation over seeds; intervals are those of the mean over seeds (Student's t), on this {found.split} "
        f"split as it is. {MISSING}: undefined, or unknown with one seed."
    )
    return table


def kind_scores(found: Comparison, task: str) -> Table | None:
    """The tested metrics by kind of sample."""
    kinds = found.kinds.get(task, [EVERY])
    if kinds == [EVERY]:
        return None
    by_place = {(s.group, s.metric, s.kind): s for s in found.scores if s.task == task}
    columns = [(metric, kind) for metric in found.tested[task] for kind in kinds]
    table = Table(f"{task}, {found.split}, by kind", ["group", *(f"{metric}, {kind}" for metric, kind in columns)])
    table.rows = [[g.name, *(_mean(by_place[g.name, m, k]) for m, k in columns)] for g in found.groups]
    return table


def differences(found: Comparison) -> Table | None:
    if not found.differences:
        return None
    tasks, kinds = len(found.tasks) > 1, any(d.kind != EVERY for d in found.differences)
    heads = [*(["task"] if tasks else []), "metric", *(["kind"] if kinds else []), "seeds", "difference"]
    table = Table(
        f"Differences{f' from {found.baseline}' if found.baseline else ' between groups'}",
        [
            "group − baseline" if found.baseline is None else "group",
            *heads,
            f"{found.level:.0%} interval",
            "p",
            "p corrected",
            "significant",
        ],
    )
    for d in found.differences:
        row = [
            d.group if found.baseline else f"{d.group} − {d.baseline}",
            *([d.task] if tasks else []),
            d.metric,
            *([d.kind] if kinds else []),
        ]
        row += [str(len(d.seeds)), signed(d.value), span(d.low, d.high, sign=True), p_value(d.p)]
        table.rows.append([*row, p_value(d.p_corrected), verdict(d)])
    less = [name for name in found.less_is_better if any(d.metric == name for d in found.differences)]
    table.note = (
        "Paired by seed and sample. Intervals and p: bootstrap over samples together with the variance over seeds; p of an accuracy: the "
        f"larger of that and McNemar's exact test. p corrected: {TESTS[found.correction]}; significant: it is at most {1 - found.level:.2g}."
        + (f" Less is better of {', '.join(less)}." if less else "")
    )
    return table


def settings(found: Comparison) -> Table | None:
    """What differs between the groups' configs."""
    if not found.differing:
        return None
    table = Table("What differs", ["setting", *(group.name for group in found.groups)], words=True)
    if len(found.groups) > len(found.differing):
        table.columns = ["group", *found.differing]
        table.rows = [[g.name, *(_setting(v[g.name]) for v in found.differing.values())] for g in found.groups]
    else:
        table.rows = [[k, *(_setting(v[g.name]) for g in found.groups)] for k, v in found.differing.items()]
    return table


def costs(found: Comparison) -> Table:
    table = Table("Cost", ["group", "seeds", "hours × processes, a run", "of all", "samples/s", "device"])
    for group in found.groups:
        amount, unit = group.cost()
        told = (
            [MISSING, MISSING] if amount is None else [f"{amount:.3g} {unit}", f"{amount * len(group.runs):.3g} {unit}"]
        )
        speed = group.speed()
        shown = MISSING if speed is None else f"{speed:.1f}"
        table.rows.append(
            [group.name, ", ".join(map(str, group.seeds)), *told, shown, ", ".join(group.devices) or MISSING]
        )
    table.note = (
        "From a run's start to its end, evaluation included (in run folders: of its last part, where it was continued); on CPUs times the "
        "threads of each process. Samples per second: the median over the training's steps."
    )
    return table


def terminal(found: Comparison) -> RenderableType:
    """Everything for the terminal."""
    parts: list[RenderableType] = []
    for table in tables(found):
        note = [Text(printable(table.note), style="dim")] if table.note else []
        parts.append(Padding(Renderables(rich_table(table), *note), (0, 0, 1, 0)))
    parts += [Text(f"note: {printable(note)}", style="yellow") for note in found.notes]
    return Renderables(*parts)


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything as plain values; undefined is None."""
    return {
        "split": found.split,
        "level": found.level,
        "correction": found.correction,
        "resamples": found.resamples,
        "baseline": found.baseline,
        "tasks": found.tasks,
        "tested": found.tested,
        "kinds": found.kinds,
        "groups": [_group_json(found, group) for group in found.groups],
        "scores": [vars(score) for score in found.scores],
        "validation": [vars(score) for score in found.validation.values()],
        "differences": [vars(difference) for difference in found.differences],
        "differing": found.differing,
        "notes": found.notes,
    }


def _group_json(found: Comparison, group: Group) -> dict[str, Any]:
    amount, unit = group.cost()
    runs = [
        {"name": run.name, "where": run.where, "seed": run.seed, "commit": run.commit, "fingerprints": run.fingerprints}
        | {f"cost_{key}": value for key, value in vars(run.cost).items()}
        for run in group.runs
    ]
    return {
        "name": group.name,
        "settings": group.settings,
        "seeds": group.seeds,
        "invalid_rate": {task: found.invalid_rate[task, group.name] for task in found.tasks},
        "cost": {"mean": amount, "unit": unit},
        "samples_per_second": group.speed(),
        "devices": group.devices,
        "runs": runs,
    }


def as_csv(found: Comparison) -> str:
    """A line per score and per difference; what is missing is an empty cell."""
    names = (
        "what", "task", "metric", "kind", "group", "baseline", "n", "seeds", "value", "sd", "low", "high", "p", "p_corrected", "seed_values",
    )  # fmt: skip
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for score in found.scores:
        seeds = " ".join(map(str, score.seeds))
        values = " ".join("" if v is None else repr(v) for v in score.values)
        writer.writerow({**vars(score), "what": "score", "value": score.mean, "seeds": seeds, "seed_values": values})
    for difference in found.differences:
        seeds = " ".join(map(str, difference.seeds))
        writer.writerow({**vars(difference), "what": "difference", "seeds": seeds})
    return out.getvalue()


def as_tex(found: Comparison) -> str:
    """Tables for LaTeX with booktabs: groups, and differences; nothing is set in bold, for that would be choosing on test."""
    parts = ["% needs \\usepackage{booktabs}"]
    shown = [group_scores(found, task) for task in found.tasks]
    shown += [table for task in found.tasks if (table := kind_scores(found, task))]
    shown += [table for table in [differences(found)] if table]
    parts += map(_tex_table, shown)
    return "\n\n".join(parts) + "\n"


def _tex_table(held: Table) -> str:
    lines = ["\\begin{tabular}{l" + "r" * (len(held.columns) - 1) + "}", "\\toprule"]
    lines += [" & ".join(map(tex, held.columns)) + " \\\\", "\\midrule"]
    lines += [" & ".join(map(tex, row)) + " \\\\" for row in held.rows]
    return "\n".join([f"% {printable(held.title)}", *lines, "\\bottomrule", "\\end{tabular}"])


def tex(text: str) -> str:
    """`text` escaped for LaTeX's text mode."""
    special = {
        "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "<": "$<$", ">": "$>$",
        "×": "$\\times$", "—": "--", "…": "\\ldots{}", **{c: f"\\{c}" for c in "&%$#_{}"},
    }  # fmt: skip
    return "".join(special.get(c, c) for c in printable(text))


def _columns(metrics: list[str], tested: list[str]) -> list[tuple[str, bool]]:
    """(metric, whether its interval): the interval stands behind each tested metric."""
    return [(metric, interval) for metric in metrics for interval in ((False, True) if metric in tested else (False,))]


def _mean(score: Score) -> str:
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


def _setting(value: str | None) -> str:
    return "(absent)" if value is None else value
