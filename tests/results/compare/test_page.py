"""A comparison's page: self-contained, escaped, and in a real browser readable in light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.browser import CHROMIUM, POOR_CONTRAST, Browser
from tests.results.seeded import make_seeded, make_two
from trainer.results.compare.comparison import compare
from trainer.results.compare.files import write_comparison
from trainer.results.compare.sources.find import find_runs

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, one of them a regression, four groups, one of a single seed and one with a name that is to be escaped."""
    folder = tmp_path_factory.mktemp("compared")
    make_two(folder / "runs", tasks=("meld", "simsv2"))
    more = {"tasks": ("meld", "simsv2"), "invalid": 0.1}
    make_seeded(folder / "runs" / "one", 1, 0.7, ["model.fusion.width=64"], **more)  # type: ignore[arg-type]
    runs = find_runs([str(folder / "runs")], ["test"]).runs
    for run in runs:
        run.group = {"full": "full", "less": "<script>alert('&')</script>"}.get(run.name[:4], "愤怒 " + "long " * 30)
    found = compare(runs, metrics=["acc", "mae"], kinds=True)
    return write_comparison(found, folder)[-1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_it_is_one_file_without_script_and_names_are_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.name == "compare.html"
    assert "<script" not in text
    assert "&lt;script&gt;alert" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    assert "mae (less is better)" in text
    assert "one seed only" in text
    assert text.count("<svg") == 12  # groups and differences, of a metric of each task, of all samples and two kinds


@pytest.mark.browser
@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [(1366, 768), (360, 740)], ids=["laptop", "narrow"])
def test_it_fits_and_can_be_read(browser: Browser, page: Path, size: tuple[int, int], dark: bool) -> None:
    browser.open(page, *size, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert browser.evaluate(POOR_CONTRAST) == []
    widest = "Math.max(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right))"
    assert browser.evaluate(widest) <= size[0]


@pytest.mark.browser
@in_browser
def test_it_asks_for_nothing_and_describes_its_pictures(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.messages == []
    pictures = browser.names("image")
    assert len(pictures) == 12
    assert all("interval" in name and len(name) > 60 for name in pictures)
    outside = """[...document.querySelectorAll('svg')].flatMap(s => { const f = s.getBoundingClientRect();
      return [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
        return b.left < f.left - 3 || b.right > f.right + 3 || b.top < f.top - 3 || b.bottom > f.bottom + 3; })
        .map(t => t.textContent); })"""
    assert browser.evaluate(outside) == []
