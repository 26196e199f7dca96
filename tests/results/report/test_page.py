"""The page in a real browser: it fits, can be read in light and dark, by keyboard and screen reader, and asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.browser import CHROMIUM, POOR_CONTRAST, Browser

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(reported: Path) -> Path:
    return reported / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [(1366, 768), (360, 740)], ids=["laptop", "narrow"])
def test_it_fits_and_can_be_read(browser: Browser, page: Path, size: tuple[int, int], dark: bool) -> None:
    browser.open(page, *size, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 20, 27)" if dark else "rgb(255, 255, 255)")
    assert browser.evaluate(POOR_CONTRAST) == []
    widest = "Math.max(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right))"
    assert browser.evaluate(widest) <= size[0]
    hidden = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 100).length"
    assert browser.evaluate(hidden) == 0


def test_it_asks_for_nothing_and_its_policy_holds(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.messages == []
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">')")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert any("Content Security Policy" in message for message in browser.messages)


def test_the_text_of_pictures_is_drawn_inside_them(browser: Browser, page: Path) -> None:
    browser.open(page)
    outside = """[...document.querySelectorAll('svg')].flatMap(s => { const f = s.getBoundingClientRect();
      return [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
        return b.left < f.left - 3 || b.right > f.right + 3 || b.top < f.top - 3 || b.bottom > f.bottom + 3; })
        .map(t => t.textContent); })"""
    assert browser.evaluate(outside) == []
    assert browser.evaluate(
        "document.querySelector('[id^=\"confusion-cherma\"]').closest('svg').textContent.includes('愤怒')"
    )


def test_screen_readers_and_keyboards(browser: Browser, page: Path) -> None:
    browser.open(page)
    pictures = browser.names("image")
    assert len(pictures) == browser.evaluate("document.querySelectorAll('svg').length")
    assert all(len(name) > 40 for name in pictures)
    assert any(name.startswith("Training loss Training loss by step: 30 at step 1") for name in pictures)
    browser.key("Tab", 9)
    assert browser.evaluate("document.activeElement.textContent") == "To the content"
    for _ in range(200):
        browser.key("Tab", 9)
        if browser.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    assert browser.evaluate("document.activeElement.parentElement.open") is False
    browser.key("Enter", 13, "\r")
    assert browser.evaluate("document.activeElement.parentElement.open") is True
