"""A comparison as one self-contained page, in the manner of a run's report: no script, nothing loaded, all text escaped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.results.compare import output
from trainer.results.compare.comparison import EVERY, Comparison, Difference, Score
from trainer.results.printable import Table
from trainer.results.report.drawing import BLUE, INK, MUTED, PAPER, Names, Picture, render
from trainer.results.report.pages import render_page

TEMPLATE = "compare.html.j2"
WIDTH, ROW, REST = 6.4, 0.3, 0.9  # inches: of a picture, of a row in it, and of what is around the rows
NAME = 42  # characters of a name on a line


@dataclass
class Section:
    """A task's part of the page."""

    task: str
    tables: list[Table]
    pictures: list[Picture]


def page(found: Comparison) -> str:
    """The page as HTML."""
    runs = sum(len(group.runs) for group in found.groups)
    tests = sum(d.p is not None for d in found.differences)
    facts = [
        ("split", found.split),
        ("groups", str(len(found.groups))),
        ("runs", str(runs)),
        ("baseline", found.baseline or "each with each"),
        ("intervals", f"{found.level:.0%}"),
        (
            "tests",
            f"{tests}, corrected {output.TESTS[found.correction].partition(' for ')[0]}"
            if found.correction != "none"
            else f"{tests}, not corrected",
        ),
        ("resamples", str(found.resamples)),
    ]
    shown: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in found.differences:
        shown.setdefault((difference.task, difference.metric, difference.kind), []).append(difference)
    about = [table for table in (output.settings(found), output.costs(found)) if table]
    return render_page(
        TEMPLATE,
        title=f"{', '.join(found.tasks)}: {len(found.groups)} group{'s' if len(found.groups) > 1 else ''} compared",
        facts=facts,
        notes=found.notes,
        sections=[_section(found, task) for task in found.tasks],
        differences=output.differences(found),
        pictures=[picture for some in shown.values() if (picture := _differences(found, some))],
        about=about,
    )


def _section(found: Comparison, task: str) -> Section:
    tables = [output.group_scores(found, task), output.kind_scores(found, task)]
    pictures = []
    for metric in found.tested[task]:
        for kind in found.kinds[task]:
            scores = [s for s in found.scores if (s.task, s.metric, s.kind) == (task, metric, kind)]
            pictures.append(_groups(found, scores))
    return Section(task, [table for table in tables if table], pictures)


def _groups(found: Comparison, scores: Sequence[Score]) -> Picture:
    """A row per group: every seed's value, the mean and its interval."""
    first = scores[0]

    def draw(figure: Figure, names: Names) -> None:
        ax = _rows(figure, [s.group for s in scores], names)
        for y, score in enumerate(scores):
            values = [v for v in score.values if v is not None]
            ax.plot(values, [y + 0.27] * len(values), "o", color=MUTED, markerfacecolor=PAPER, markersize=4, zorder=2)
            if score.mean is not None:
                _bar(ax, y, score.mean, score.low, score.high, BLUE)
        ax.set_xlabel(_axis_label(found, first.metric))

    told = [f"{s.group} {output.number(s.mean)}, {output.span(s.low, s.high)}" for s in scores]
    title = f"{first.metric} of {first.task}, {found.split}{'' if first.kind == EVERY else f', {first.kind}'}"
    return render(
        _name("groups", first.task, first.metric, first.kind),
        title,
        draw,
        alt=f"Mean and {found.level:.0%} interval by group: {'; '.join(told)}.",
        caption=f"Filled: the mean over seeds with its {found.level:.0%} interval; rings: the seeds. Undefined values are not drawn.",
        size=(WIDTH, ROW * len(scores) + REST),
        as_png=False,
    )


def _differences(found: Comparison, rows: Sequence[Difference]) -> Picture | None:
    """A row per difference, with its interval and the line of no difference; None where all are undefined."""
    known = [d for d in rows if d.value is not None]
    if not known:
        return None
    first = known[0]
    labels = [d.group if found.baseline else f"{d.group} − {d.baseline}" for d in known]

    def draw(figure: Figure, names: Names) -> None:
        ax = _rows(figure, labels, names)
        ax.axvline(0, color=INK, linewidth=1)
        for y, d in enumerate(known):
            assert d.value is not None
            _bar(ax, y, d.value, d.low, d.high, BLUE if d.significant else MUTED)
        minus = f" − {found.baseline}" if found.baseline else ""
        ax.set_xlabel(
            textwrap.shorten(f"difference of {_axis_label(found, first.metric)}{minus}", 2 * NAME, placeholder=" …")
        )

    told = [
        f"{label} {output.signed(d.value)}, {output.span(d.low, d.high, sign=True)}, significant: {output.verdict(d)}"
        for label, d in zip(labels, known, strict=True)
    ]
    title = f"Differences of {first.metric} of {first.task}, {found.split}"
    return render(
        _name("differences", first.task, first.metric, first.kind),
        title + ("" if first.kind == EVERY else f", {first.kind}"),
        draw,
        alt=f"Differences with {found.level:.0%} intervals: {'; '.join(told)}.",
        caption=f"{found.level:.0%} intervals, each by itself. Blue: significant after correction for all tests.",
        size=(WIDTH, ROW * len(known) + REST),
        as_png=False,
    )


def _rows(figure: Figure, labels: Sequence[str], names: Names) -> Axes:
    ax = figure.add_subplot()
    shown = [textwrap.fill(textwrap.shorten(names(label), 2 * NAME, placeholder=" …"), NAME) for label in labels]
    ax.set_yticks(range(len(labels)), shown)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return ax


def _bar(ax: Axes, y: int, value: float, low: float | None, high: float | None, colour: str) -> None:
    if low is not None and high is not None:
        ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", zorder=3)
    ax.plot([value], [y], "o", color=colour, markersize=6, zorder=4)


def _axis_label(found: Comparison, metric: str) -> str:
    return f"{metric} (less is better)" if metric in found.less_is_better else metric


def _name(*words: str) -> str:
    """An id for the page: letters, digits and hyphens."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else "-" for c in word) for word in words)
