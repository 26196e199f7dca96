"""The report of a run: one self-contained page, ``report.html``, and its pictures as PNG files in ``report/``.

The page loads nothing: style and pictures (SVG) are written into it, and its content security policy forbids the rest. It
has no script. Everything that comes from data is escaped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.files import write_text
from trainer.results import tables
from trainer.results.analysis import TaskResults, analyse
from trainer.results.report.drawing import Picture
from trainer.results.report.pages import render_page
from trainer.results.report.pictures import run_pictures, task_pictures
from trainer.results.run_folder import SPLITS, RunFolder, read_run
from trainer.results.runs import selected_value, state_of

PAGE, PICTURES, TEMPLATE = "report.html", "report", "report.html.j2"


@dataclass
class Headline:
    """The number of a task that counts, and what a constant answer gets."""

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
    open: list[tables.Table]
    folded: list[tables.Table]


def write_report(run: Path) -> list[Path]:
    """Write ``report.html`` and ``report/*.png`` into the run folder, each whole or not at all; return the PNG files.

    Works on any run folder, in progress and damaged ones too: what is missing is said on the page. Pictures that an
    earlier report left and this one does not have are removed.

    Raises:
        ValueError: `run` is not a run folder.
        OSError: it cannot be written.
    """
    held = read_run(run)
    results = analyse(held)
    general = run_pictures(held)
    sections = [_section(r, several=len(results) > 1) for r in results]
    pictures = [*general, *(picture for section in sections for picture in section.pictures)]
    written = _write_pictures(run / PICTURES, pictures)
    write_text(run / PAGE, page(held, general, sections))
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
    seen = [tables.scores(results), tables.per_class(results)]
    folded = [
        tables.confusion(results),
        tables.calibration(results),
        tables.temperature(results),
        *tables.gates(results),
    ]
    folded += [tables.balance(results), tables.robustness(results)]
    return Section(
        results,
        task_pictures(results, several),
        [table for table in seen if table],
        [table for table in folded if table],
    )


def _headlines(run: RunFolder, results: list[TaskResults]) -> list[Headline]:
    """A task's selecting metric on its most telling split; before there are scores, on the validation so far."""
    made = []
    for one in results:
        name = one.task.select
        split = next((split for split in SPLITS if split in one.scores), None)
        if split is None:
            continue
        values: dict[str, Any] = one.scores[split]
        beside = []
        if one.constant_scores is not None and split == one.split:
            beside.append((str(one.constant), tables.number(one.constant_scores.get(name))))
        others = [s for s in SPLITS if s in one.scores and s != split]
        beside += [(f"{name}, {other}", tables.number(one.scores[other].get(name))) for other in others]
        beside += [(key, tables.number(values[key])) for key in ("n", "invalid_rate", "ece") if key in values]
        made.append(Headline(one.task.name, name, tables.number(values.get(name)), split, beside))
    if not made and run.selected():
        so_far = selected_value(run)
        where = f"valid so far, at step {so_far.step}"
        made.append(Headline(", ".join(run.tasks), so_far.metric or "", tables.number(so_far.value), where, []))
    return made


def _write_pictures(folder: Path, pictures: list[Picture]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    written = []
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(picture.png)
        temporary.replace(path)
        written.append(path)
    for left in set(folder.glob("*.png")) - set(written):
        left.unlink()
    return written
