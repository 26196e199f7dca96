"""A run for the terminal, and as one JSON object: the same content as its page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from trainer.results import tables
from trainer.results.analysis import analyse
from trainer.results.baselines_beside import add_baselines
from trainer.results.printable import Table, printable, rich_table
from trainer.results.run_folder import RunFolder, read_run
from trainer.results.runs import STYLES, state_of
from trainer.results.task_results import Example, TaskResults


def show_run(path: Path) -> Group:
    """Everything about a run, to be printed.

    Raises:
        ValueError: `path` is not a run folder.
    """
    run = read_run(path)
    results = analyse(run)
    add_baselines(run, results)
    return Group(*_parts(run, results))


def run_json(path: Path) -> dict[str, object]:
    """Everything about a run as JSON values; what is undefined is None.

    Raises:
        ValueError: `path` is not a run folder.
    """
    run = read_run(path)
    results = analyse(run)
    add_baselines(run, results)
    state = state_of(run)
    config = None if run.config is None else run.config.model_dump(mode="json")
    whole: dict[str, object] = {
        "run": run.name,
        "path": str(run.path),
        "state": state.name,
        "why": state.why,
        "baseline": run.baseline,
        "step": run.step,
        "steps": run.steps,
        "checkpoint": run.checkpoint,
        "tasks": {r.task.name: _task_json(r) for r in results},
        "validation": run.selected(),
        "training": {name: series for name, series in run.journal.items() if name.startswith(("train/", "gate/"))},
        "config": config,
        "record": run.record,
        "notes": run.notes,
    }
    return {key: _json_value(value) for key, value in whole.items()}


def _task_json(results: TaskResults) -> dict[str, object]:
    gates, damaged = results.gates, results.robustness
    return {
        "scores": results.scores,
        "split": results.split,
        "constant": {"answer": results.constant, "scores": results.constant_scores},
        "baselines": results.baselines,
        "reliability": results.reliability,
        "coverage": results.coverage,
        "calibration": results.calibration,
        "balance": results.balance,
        "robustness": damaged and {**damaged.measured, "run": damaged.run, "split": damaged.split},
        "warnings": results.warnings,
        "gates": gates and {"all": gates.all, "inside": gates.inside, **gates.groups},
        "best": results.best,
        "worst": results.worst,
    }


def _json_value(value: object) -> object:
    """Dataclasses as objects, tuples as lists, numbers that are not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _json_value(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parts(run: RunFolder, results: list[TaskResults]) -> Iterator[RenderableType]:
    yield Text(printable(run.name), "bold")
    for name, value in tables.facts(run):
        style = STYLES.get(state_of(run).name, "") if name == "state" else ""
        yield Text.assemble((f"  {name:<11}", "dim"), (printable(value), style))
    yield from _notes(run)
    for table in (tables.training(run), tables.validation(run)):
        yield from _table(table)
    for task in results:
        for warning in task.warnings:
            yield Text.assemble(("  warning    ", "dim"), (printable(warning), "yellow"))
        for table in (tables.scores(task), tables.per_class(task), *tables.task_details(task)):
            yield from _table(table)
        yield from _examples(task)
    yield from _table(tables.environment(run))
    if run.config is not None:
        yield Text("\nConfig", "bold")
        dumped = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        yield Padding(Text("\n".join(map(printable, dumped.splitlines()))), (0, 0, 0, 2))


def _notes(run: RunFolder) -> Iterator[RenderableType]:
    for note in run.notes:
        yield Text.assemble(("  note       ", "dim"), (printable(note), "yellow"))


def _table(table: Table | None) -> Iterator[RenderableType]:
    if table is None:
        return
    yield Text()
    yield rich_table(table, box.SIMPLE_HEAD)
    if table.note:
        yield Text(f"  {printable(table.note)}", "dim")


def _examples(task: TaskResults) -> Iterator[RenderableType]:
    for word, examples in (("best", task.best), ("worst", task.worst)):
        if examples:
            yield Text(f"\nAnswered {word}: {task.task.name}, {task.split}", "bold")
        for example in examples:
            yield from _example(example)


def _example(example: Example) -> Iterator[RenderableType]:
    text = "(text unavailable)" if example.text is None else printable(example.text)
    yield Text.assemble("  ", (printable(example.id), "cyan"), "  ", text)
    for name, value in tables.example_lines(example):
        yield Text.assemble((f"      {name:<14}", "dim"), printable(value))
