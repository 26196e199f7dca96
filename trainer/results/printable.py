"""What people see of results: text without control characters, metrics as text, and tables of text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import HEAVY_HEAD, Box
from rich.table import Table as RichTable
from rich.text import Text


def printable(text: str) -> str:
    """`text` on one line, every character that is neither printable nor a space replaced: safe for terminals and XML."""
    return "".join(" " if c.isspace() else c if unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def format_metric(value: object) -> str:
    """A metric as text: four decimals, counts as they are, ``undefined`` for None."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@dataclass
class Table:
    """A table of text. The first column labels the rows; the other columns hold numbers unless `words` is true."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""
    words: bool = False


def rich_table(table: Table, box: Box = HEAVY_HEAD) -> RichTable:
    """The table for a terminal: nothing is cut off, and no text is taken for markup."""
    rendered = RichTable(title=Text(printable(table.title), "bold"), title_justify="left", box=box)
    rendered.show_header = any(table.columns)
    for i, name in enumerate(table.columns):
        rendered.add_column(
            Text(printable(name)), justify="right" if i and not table.words else "left", overflow="fold"
        )
    for row in table.rows:
        rendered.add_row(*(Text(printable(cell)) for cell in row))
    return rendered
