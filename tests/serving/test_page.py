"""The page on answers in Python is a notebook: its blocks run one after the other, and print what it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import ROOT

PAGE = ROOT / "docs" / "python.md"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
SHOWN = re.compile(r"# → (.*)$", re.MULTILINE)


def test_the_page_does_what_it_says(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "both-s0").symlink_to(run)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__page__"}
    left_out = []
    for block in BLOCK.finditer(text):
        code, line = block["code"], text.count("\n", 0, block.start("code"))
        compiled = compile("\n" * line + code, str(PAGE), "exec")
        if block["reason"]:
            left_out.append(block["reason"])
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled, names)
        expected = "".join(f"{shown}\n" for shown in SHOWN.findall(code))
        assert printed.getvalue() == expected, f"line {line + 1}"
    assert left_out == [
        "the data of the small run come from no recipe",
        "the small run asks one question of a sample",
    ]


def test_lines_are_not_long() -> None:
    for page in (PAGE, ROOT / "docs" / "engines.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{page.name} line {number}"
