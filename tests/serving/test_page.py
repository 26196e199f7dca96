"""The page on answers in Python is a notebook: its blocks run one after the other, and print what it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.processes import egmf
from tests.serving.conftest import ROOT
from tests.toy import WIDTHS
from trainer import Predictor

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


def test_transformers_score_as_the_page_on_engines_says(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that need no engine, on an exported folder; by their own words the scores are those of `eval.score=full`."""
    monkeypatch.chdir(tmp_path)
    done = egmf("export", str(run), "--out", str(tmp_path / "meld"), "--merge")
    assert done.returncode == 0, done.stderr
    np.save("a1.npy", np.random.default_rng(0).normal(size=(9, WIDTHS["audio"])))
    blocks = [block["code"] for block in BLOCK.finditer((ROOT / "docs" / "engines.md").read_text(encoding="utf-8"))]
    assert [("vllm" in block, "requests" in block) for block in blocks] == [(False, False)] * 2 + [
        (True, False),
        (False, True),
    ]
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks[:2]:
        exec(compile(block, "engines.md", "exec"), names)
    for block in blocks[2:]:
        compile(block, "engines.md", "exec")
    full = Predictor.load(tmp_path / "meld", overrides=["eval.score=full"])
    (answer,) = full.predict([{"text": "I told you so.", "audio": "a1.npy", "task": "meld"}])
    scores = np.array([names["scores"][word] for word in answer.probabilities or {}])
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    np.testing.assert_allclose(list((answer.probabilities or {}).values()), expected, atol=1e-5)


def test_lines_are_not_long() -> None:
    for page in (PAGE, ROOT / "docs" / "engines.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{page.name} line {number}"
