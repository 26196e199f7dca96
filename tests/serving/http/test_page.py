"""The page to try a model, in a real browser: by keyboard, light and dark, wide and narrow; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.browser.browser import CHROMIUM, POOR_CONTRAST, Browser
from tests.serving.http.conftest import SMALL
from tests.serving.http.servers import InThread, serving
from trainer.serving.predictor import Predictor

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("features") / "f.npz"
    np.savez(file, audio=rng.normal(size=(9, 6)), video=rng.normal(size=(4, 5)))
    return file


def visit(browser: Browser, server: InThread, width: int = 1200, *, dark: bool = False) -> None:
    browser.visit(f"http://127.0.0.1:{server.port}/", width, 900, dark=dark)
    browser.until("tasks && !document.getElementById('form').hidden")


def choose(browser: Browser, task: str) -> None:
    change = "document.getElementById('task').dispatchEvent(new Event('change'))"
    browser.evaluate(f"document.getElementById('task').value = {task!r}; {change}")


def ask(browser: Browser) -> None:
    browser.evaluate("document.getElementById('ask').click()")
    browser.until("document.querySelector('.value') || document.querySelector('.fault')")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("task", ["meld", "simsv2"])
def test_an_answer_is_shown(
    browser: Browser, server: InThread, features: Path, predictor: Predictor, task: str, width: int, dark: bool
) -> None:
    visit(browser, server, width, dark=dark)
    choose(browser, task)
    browser.type("#text", "I told you so")
    browser.upload("#features", features)
    ask(browser)
    with np.load(features) as arrays:
        given = {"text": "I told you so", "task": task, "audio": arrays["audio"], "video": arrays["video"]}
    [expected] = predictor.predict([given])
    shown = browser.evaluate("document.querySelector('.value').textContent")
    assert shown == expected.prediction if task == "meld" else abs(float(shown) - float(expected.prediction)) < 6e-4
    assert expected.probabilities is not None
    assert expected.gate_expert is not None
    rows = browser.evaluate(
        "[...document.querySelectorAll('.bars li')].map(row => [...row.children].map(cell => cell.textContent))"
    )
    bars = {name: float(number) for name, _, number in rows}
    shares = {**(expected.probabilities if task == "meld" else {}), **expected.gate_expert}
    assert bars.keys() == shares.keys()
    assert all(abs(bars[name] - (share or 0)) < 6e-4 for name, share in shares.items())
    if task == "simsv2":
        heights = browser.evaluate(
            "[...document.querySelectorAll('.columns i')].map(column => parseFloat(column.style.height))"
        )
        most = max(expected.probabilities.values())
        assert np.allclose(heights, [100 * p / most for p in expected.probabilities.values()], atol=0.1)
    cells = browser.evaluate("[...document.querySelectorAll('tbody tr')].map(row => row.innerText.split(/\\s+/))")
    assert {row[0] for row in cells} == expected.gate_expert.keys()
    assert browser.evaluate(POOR_CONTRAST) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.messages == []
    assert {url.partition("/")[0] for url in browser.requests} == {"http:"}
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in browser.requests)


def test_all_of_it_by_keyboard(browser: Browser, server: InThread) -> None:
    visit(browser, server)
    passed = []
    for _ in range(5):
        browser.key("Tab", 9)
        passed.append(browser.evaluate("document.activeElement.id"))
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if passed[-1] == "text":
            browser.ask("Input.insertText", text="by keyboard")
        if passed[-1] == "ask":
            break
    assert passed == ["task", "text", "features", "ask"]
    browser.key("Enter", 13, "\r")
    browser.until("document.querySelector('.value')")
    assert set(browser.names("combobox")) == {"Task"}
    assert {"Text", "An .npz file with arrays audio, video or both, [frames, features]"} <= {
        *browser.names("textbox"),
        *browser.names("button"),
        *browser.names("LabelText"),
        *browser.evaluate("[...document.querySelectorAll('label')].map(label => label.textContent)"),
    }


def test_faults_are_shown_as_text(browser: Browser, server: InThread, tmp_path: Path) -> None:
    visit(browser, server, 400, dark=True)
    ask(browser)
    assert "no text, no clip and no features" in browser.evaluate("document.querySelector('.fault').textContent")
    bad = tmp_path / "bad.npz"
    np.savez(bad, **{"<img src=x onerror=alert(1)>": np.ones((2, 2))}, other=np.ones((2, 2)))
    browser.upload("#features", bad)
    ask(browser)
    browser.until("document.querySelector('.fault').textContent.includes('<img src=x')")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate(POOR_CONTRAST) == []


def test_a_token_is_asked_for(browser: Browser, predictor: Predictor, tmp_path: Path) -> None:
    token = "0123456789abcdef0123456789abcdef"
    (tmp_path / "token").write_text(token)
    with serving(predictor, SMALL, token_file=tmp_path / "token") as guarded:
        browser.visit(f"http://127.0.0.1:{guarded.port}/", 400, 900)
        browser.until("!document.getElementById('token-row').hidden")
        assert browser.evaluate(POOR_CONTRAST) == []
        browser.type("#token", token)
        browser.key("Enter", 13, "\r")
        browser.until("tasks")
        browser.type("#text", "with a token")
        ask(browser)
        assert browser.evaluate("document.querySelectorAll('.value').length") == 1
