"""The report of a run: one self-contained page, ``report.html``, and its pictures as PNG files in ``report/``.

The page loads nothing: style and pictures (SVG) are written into it, and its content security policy forbids the rest. It
has no script. Everything that comes from data is escaped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.files import write_text
from trainer.results import tables
from trainer.results.analysis import analyse
from trainer.results.baselines_beside import add_baselines
from trainer.results.printable import Table, format_metric
from trainer.results.report.drawing import Picture
from trainer.results.report.pages import render_page
from trainer.results.report.prediction_pictures import task_pictures
from trainer.results.report.training_pictures import run_pictures
from trainer.results.run_folder import SPLITS, RunFolder, read_run
from trainer.results.runs import selected_value, state_of
from trainer.results.task_results import TaskResults

PAGE, PICTURES, TEMPLATE = "report.html", "report", "report.html.j2"


@dataclass
class Headline:
    """A task's selecting metric in large type; `beside` are further numbers below it, the constant answer's first."""

    task: str
    metric: str
    value: str
    where: str
    beside: list[tuple[str, str]]


@dataclass
class Section:
    """A task's part of the page."""

    results: TaskResults
    pictures: list[Picture]
    open: list[Table]
    folded: list[Table]


def write_report(run: Path) -> list[Path]:
    """Write ``report.html`` and ``report/*.png`` into the run folder, each whole or not at all; return the PNG files.

    Works on any run folder, in progress and damaged ones too: the page lists what is missing. Pictures of an earlier
    report that this one does not have are removed.

    Raises:
        ValueError: `run` is not a run folder.
        OSError: it cannot be written.
    """
    folder = read_run(run)
    results = analyse(folder)
    add_baselines(folder, results)
    general = run_pictures(folder)
    sections = [_section(r, several=len(results) > 1) for r in results]
    pictures = [*general, *(picture for section in sections for picture in section.pictures)]
    written = _write_pictures(run / PICTURES, pictures)
    write_text(run / PAGE, page(folder, general, sections))
    return written


def page(run: RunFolder, general: list[Picture], sections: list[Section]) -> str:
    """The page as HTML."""
    config = None if run.config is None else run.config.model_dump(mode="json")
    stand_ins = {k: v for section in sections for p in section.pictures for k, v in p.stand_ins.items()}
    return render_page(
        TEMPLATE,
        run=run,
        state=state_of(run),
        facts=tables.facts(run)[1:],
        headlines=_headlines(run, [section.results for section in sections]),
        general=general,
        run_tables=[table for table in (tables.training(run), tables.validation(run)) if table],
        sections=sections,
        environment=tables.environment(run),
        config=config and yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        stand_ins=stand_ins,
        example_lines=tables.example_lines,
        folder=PICTURES,
    )


def _section(results: TaskResults, *, several: bool) -> Section:
    return Section(
        results,
        task_pictures(results, several),
        [table for table in (tables.scores(results), tables.per_class(results)) if table],
        tables.task_details(results),
    )


def _headlines(run: RunFolder, results: list[TaskResults]) -> list[Headline]:
    """Each task's selecting metric on the first of SPLITS that has scores; before there are any, on the validation so far."""
    headlines = []
    for result in results:
        name = result.task.select
        splits = [split for split in SPLITS if split in result.scores]
        if not splits:
            continue
        values = result.scores[splits[0]]
        beside = []
        if result.constant_scores is not None and splits[0] == result.split:
            beside.append((str(result.constant), format_metric(result.constant_scores.get(name))))
        beside += [(f"{name}, {other}", format_metric(result.scores[other].get(name))) for other in splits[1:]]
        beside += [(key, format_metric(values.get(key))) for key in ("n", "invalid_rate", "ece") if key in values]
        headlines.append(Headline(result.task.name, name, format_metric(values.get(name)), splits[0], beside))
    if not headlines and run.selected():
        so_far = selected_value(run)
        where = f"valid so far, at step {so_far.step}"
        headlines.append(Headline(", ".join(run.tasks), so_far.metric or "", format_metric(so_far.value), where, []))
    return headlines


def _write_pictures(folder: Path, pictures: list[Picture]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    written = []
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(picture.png)
        temporary.replace(path)
        written.append(path)
    for outdated in set(folder.glob("*.png")) - set(written):
        outdated.unlink()
    return written
