"""A comparison as one self-contained page like a run's report: no script, nothing loaded, all text escaped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.distributed.messages import group_by_value
from trainer.results.compare import output
from trainer.results.compare.result import EVERY, Comparison, Difference, Score
from trainer.results.printable import Table
from trainer.results.report.drawing import BLUE, INK, MUTED, PAPER, Names, Picture, render
from trainer.results.report.pages import render_page

TEMPLATE = "compare.html.j2"
WIDTH, ROW_HEIGHT, MARGINS = 6.4, 0.3, 0.9  # inches: width, height of a row, and height around the rows
LABEL = 42  # characters of a label on a line


@dataclass
class Section:
    """A task's part of the page."""

    task: str
    tables: list[Table]
    pictures: list[Picture]


def page(comparison: Comparison) -> str:
    """The page as HTML."""
    runs = sum(len(group.runs) for group in comparison.groups if group.baseline is None)
    baselines = len(comparison.baselines)
    tests = sum(d.p is not None for d in comparison.differences)
    facts = [
        ("split", comparison.split),
        ("groups", str(len(comparison.groups))),
        ("runs", str(runs)),
        *([("baselines of scikit-learn", str(baselines))] if baselines else []),
        ("baseline", comparison.baseline or "each with each"),
        ("intervals", f"{comparison.level:.0%}"),
        (
            "tests",
            f"{tests}, corrected {output.CORRECTIONS[comparison.correction].partition(' for ')[0]}"
            if comparison.correction != "none"
            else f"{tests}, not corrected",
        ),
        ("resamples", str(comparison.resamples)),
    ]
    by_metric = group_by_value((d, (d.task, d.metric, d.kind)) for d in comparison.differences)
    about = [table for table in (output.settings(comparison), output.costs(comparison)) if table]
    return render_page(
        TEMPLATE,
        title=f"{', '.join(comparison.tasks)}: {len(comparison.groups)} group{'s' if len(comparison.groups) > 1 else ''} compared",
        facts=facts,
        notes=comparison.notes,
        sections=[_section(comparison, task) for task in comparison.tasks],
        differences=output.differences(comparison),
        pictures=[picture for rows in by_metric.values() if (picture := _differences(comparison, rows))],
        about=about,
    )


def _section(comparison: Comparison, task: str) -> Section:
    tables = [
        output.group_scores(comparison, task),
        output.fold_scores(comparison, task),
        output.kind_scores(comparison, task),
    ]
    pictures = []
    for metric in comparison.tested[task]:
        for kind in comparison.kinds[task]:
            scores = [s for s in comparison.scores if (s.task, s.metric, s.kind) == (task, metric, kind)]
            pictures.append(_groups(comparison, scores))
    return Section(task, [table for table in tables if table], pictures)


def _groups(comparison: Comparison, scores: Sequence[Score]) -> Picture:
    """A row per group: every seed's value, the mean and its interval."""
    first = scores[0]

    def draw(figure: Figure, names: Names) -> None:
        ax = _rows(figure, [s.group for s in scores], names)
        for y, score in enumerate(scores):
            values = [v for v in score.values if v is not None]
            ax.plot(values, [y + 0.27] * len(values), "o", color=MUTED, markerfacecolor=PAPER, markersize=4, zorder=2)
            if score.mean is not None:
                _bar(ax, y, score.mean, score.low, score.high, BLUE)
        ax.set_xlabel(_axis_label(comparison, first.metric))

    listed = [f"{s.group} {output.number(s.mean)}, {output.span(s.low, s.high)}" for s in scores]
    title = f"{first.metric} of {first.task}, {comparison.split}{'' if first.kind == EVERY else f', {first.kind}'}"
    return render(
        _name("groups", first.task, first.metric, first.kind),
        title,
        draw,
        alt=f"Mean and {comparison.level:.0%} interval by group: {'; '.join(listed)}.",
        caption=f"Filled: mean over seeds with its {comparison.level:.0%} interval; rings: the seeds. Undefined values are not drawn.",
        size=(WIDTH, ROW_HEIGHT * len(scores) + MARGINS),
        as_png=False,
    )


def _differences(comparison: Comparison, rows: Sequence[Difference]) -> Picture | None:
    """A row per difference, with its interval and the line of no difference; None where all are undefined."""
    known = [d for d in rows if d.value is not None]
    if not known:
        return None
    first = known[0]
    labels = [d.group if comparison.baseline else f"{d.group} − {d.baseline}" for d in known]

    def draw(figure: Figure, names: Names) -> None:
        ax = _rows(figure, labels, names)
        ax.axvline(0, color=INK, linewidth=1)
        for y, d in enumerate(known):
            assert d.value is not None
            _bar(ax, y, d.value, d.low, d.high, BLUE if d.significant else MUTED)
        minus = f" − {comparison.baseline}" if comparison.baseline else ""
        label = f"difference of {_axis_label(comparison, first.metric)}{minus}"
        ax.set_xlabel(textwrap.shorten(label, 2 * LABEL, placeholder=" …"))

    listed = [
        f"{label} {output.signed(d.value)}, {output.span(d.low, d.high, sign=True)}, significant: {output.verdict(d)}"
        for label, d in zip(labels, known, strict=True)
    ]
    title = f"Differences of {first.metric} of {first.task}, {comparison.split}"
    return render(
        _name("differences", first.task, first.metric, first.kind),
        title + ("" if first.kind == EVERY else f", {first.kind}"),
        draw,
        alt=f"Differences with {comparison.level:.0%} intervals: {'; '.join(listed)}.",
        caption=f"{comparison.level:.0%} intervals, uncorrected. Blue: significant after correction for all tests.",
        size=(WIDTH, ROW_HEIGHT * len(known) + MARGINS),
        as_png=False,
    )


def _rows(figure: Figure, labels: Sequence[str], names: Names) -> Axes:
    ax = figure.add_subplot()
    texts = [textwrap.fill(textwrap.shorten(names(label), 2 * LABEL, placeholder=" …"), LABEL) for label in labels]
    ax.set_yticks(range(len(labels)), texts)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return ax


def _bar(ax: Axes, y: int, value: float, low: float | None, high: float | None, colour: str) -> None:
    if low is not None and high is not None:
        ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", zorder=3)
    ax.plot([value], [y], "o", color=colour, markersize=6, zorder=4)


def _axis_label(comparison: Comparison, metric: str) -> str:
    return f"{metric} (less is better)" if metric in comparison.less_is_better else metric


def _name(*words: str) -> str:
    """An id for the page: letters, digits and hyphens."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else "-" for c in word) for word in words)
