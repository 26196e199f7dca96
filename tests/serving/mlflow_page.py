"""The commands and blocks of code of docs/mlflow.md, as they are written there."""

from __future__ import annotations

import re

from tests.distributed.processes import ROOT

_FENCED = re.compile(r"```python ?(\w*)\n(.*?)```", re.DOTALL)


def page() -> str:
    return (ROOT / "docs" / "mlflow.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    """The one block of Python of a kind, which stands behind ``python`` where it begins."""
    (found,) = [text for name, text in _FENCED.findall(page()) if name == kind]
    return str(found)


def steps() -> list[str]:
    """Commands of the shell and plain blocks of Python, from top to bottom; a block begins with ``import`` or ``from``."""
    found = [(match.start(), match[2]) for match in _FENCED.finditer(page()) if not match[1]]
    found += [
        (match.start(), match[1])
        for match in re.finditer(r"^    ((?:egmf|mlflow|export|curl) .*)$", _without_blocks(), re.M)
    ]
    return [text for _, text in sorted(found)]


def _without_blocks() -> str:
    return _FENCED.sub(lambda match: " " * len(match[0]), page())
