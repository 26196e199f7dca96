"""What the commands print: messages on stderr, tables, and one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trainer.terminal import for_terminal, literal_console

if TYPE_CHECKING:  # rich takes a third of the time that `egmf --help` needs
    from rich.console import Console
    from rich.progress import Progress


def say(text: str) -> None:
    """A message for people, on stderr."""
    sys.stderr.write(for_terminal(text) + "\n")


def wide() -> Console:
    """A console that never cuts a table: as wide as it needs where stdout is no terminal."""
    console = literal_console()
    return console if console.is_terminal else literal_console(width=240)


@contextlib.contextmanager
def progress_bar(*, visible: bool = True, console: Console | None = None) -> Iterator[Progress]:
    """A transient progress bar on stderr; none where stderr is no terminal."""
    from rich.progress import Progress

    console = console or literal_console(stderr=True)
    with Progress(console=console, transient=True, disable=not (visible and console.is_terminal)) as bar:
        yield bar


def print_metrics(results: dict[str, Any]) -> None:
    """A table of the scalar metrics, a column per split and task."""
    columns = {
        f"{task} {split}": values
        for split, tasks in results.items()
        if isinstance(tasks, dict)
        for task, values in tasks.items()
    }
    print_columns(columns, f"checkpoint {results['checkpoint']}" if "checkpoint" in results else None)


def print_columns(columns: Mapping[str, Mapping[str, Any]], title: str | None = None) -> None:
    """A table of scalar metrics, a column for each of `columns`."""
    from rich.table import Table

    from trainer.results.printable import format_metric

    names = list(
        dict.fromkeys(k for v in columns.values() for k, x in v.items() if x is None or isinstance(x, (int, float)))
    )
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for head in columns:
        table.add_column(head, justify="right")
    for name in names:
        table.add_row(name, *(format_metric(values.get(name, "")) for values in columns.values()))
    wide().print(table)


_result_descriptor = 1


def result_descriptor() -> int:
    """The file descriptor of the real stdout."""
    return _result_descriptor


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever this process and its libraries write to stdout goes to stderr; `print_json` keeps the real one."""
    global _result_descriptor
    sys.stdout.flush()
    _result_descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(_result_descriptor, 1)
        os.close(_result_descriptor)
        _result_descriptor = 1


def print_json(value: Any) -> None:
    """One line of JSON on the real stdout."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # which UTF-8 cannot hold
        text = json.dumps(value, allow_nan=False) + "\n"
    with os.fdopen(os.dup(_result_descriptor), "w", encoding="utf-8") as stream:
        stream.write(text)
