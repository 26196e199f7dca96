"""Clips over HTTP: extracted as `egmf predict` extracts them, recorded in the page, and none that is broken costs more than itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.browser.browser import CHROMIUM, Browser
from tests.features.clips import read_lines, write_lines
from tests.serving.conftest import WORLD
from tests.serving.http.conftest import SMALL
from tests.serving.http.servers import InThread, form, serving
from tests.tones import make_tones
from trainer.results.predict import Options, predict
from trainer.run.saved import SavedRun, open_run
from trainer.serving.predictor import Predictor


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def opened_tones(tones: Path) -> SavedRun:
    return open_run(tones / "run", WORLD)


@pytest.fixture(scope="module")
def server(opened_tones: SavedRun) -> Iterator[InThread]:
    with serving(Predictor(opened_tones), replace(SMALL, body_seconds=10), clips=1) as running:
        yield running


@pytest.mark.parametrize("name", ["0.mp4", "4.wav"])
def test_a_clip_is_answered_as_the_command_answers_it(
    server: InThread, opened_tones: SavedRun, tones: Path, tmp_path: Path, name: str
) -> None:
    row = {"id": "c", "clip": str(tones / name), "text": "number 0", "start": 0.1, "end": 0.4}
    lines = write_lines(tmp_path / "in.jsonl", [row])
    predict(
        opened_tones,
        [lines or tmp_path / "in.jsonl"],
        tmp_path / "out.jsonl",
        Options(probabilities=True, gates=True),
        report=print,
    )
    [expected] = read_lines(tmp_path / "out.jsonl")
    fields = {"id": "c", "text": "number 0", "start": "0.1", "end": "0.4", "probabilities": "true", "gates": "true"}
    reply = server.ask("POST", "/v1/predict", *form(fields, {"clip": (tones / name).read_bytes()}))
    assert reply.status == 200, reply.body
    assert reply.json["predictions"] == [json.loads(json.dumps(expected))]
    assert server.get("/v1/tasks").json["clips"] == {"taken": True, "why_not": None}


@pytest.mark.parametrize("content", [b"no media at all", b"RIFF" + bytes(400), b""])
def test_what_is_no_clip_is_refused(server: InThread, content: bytes) -> None:
    reply = server.ask("POST", "/v1/predict", *form({"text": "a"}, {"clip": content}))
    assert reply.status == 422
    [fault] = reply.error["faults"]
    assert fault["where"] == "clip"
    assert "/" not in fault["reason"].replace("audio/", "")  # no path of the server


def test_a_span_outside_of_the_clip_is_refused(server: InThread, tones: Path) -> None:
    wav = (tones / "4.wav").read_bytes()
    for span in ({"start": "5", "end": "6"}, {"start": "2", "end": "1"}, {"start": "x"}, {"end": "nan"}):
        reply = server.ask("POST", "/v1/predict", *form({"text": "a", **span}, {"clip": wav}))
        assert reply.status == 422, span
    assert server.ask("POST", "/v1/predict", *form({"text": "a"}, {"clip": wav})).status == 200


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_clip_is_recorded_and_uploaded_in_the_page(server: InThread, tones: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    try:
        browser.visit(f"http://127.0.0.1:{server.port}/", 400, 800)
        browser.until("!document.getElementById('clip-row').hidden")
        browser.type("#text", "number 0")
        browser.upload("#clip", tones / "0.mp4")
        browser.evaluate("document.getElementById('ask').click()")
        browser.until("document.querySelector('.value')")
        assert browser.evaluate("document.querySelector('.value').textContent") in ("low", "high")
        browser.evaluate("document.getElementById('record').focus()")
        browser.key("Enter", 13, "\r")
        browser.until("recorder && recorder.state === 'recording' && !document.getElementById('stop').hidden")
        browser.until("document.getElementById('record-note').textContent === '1 s'")
        browser.key("Enter", 13, "\r")  # the focus is on what stops it
        browser.until("recording && recording.size > 100 && !document.getElementById('preview').hidden")
        browser.evaluate("document.getElementById('answers').replaceChildren()")
        browser.evaluate("document.getElementById('ask').click()")
        browser.until("document.querySelector('.value') || document.querySelector('.fault')", 60)
        assert browser.evaluate("document.querySelector('.value')?.textContent") in ("low", "high")
        assert browser.messages == []
        assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "blob:", "data:")) for url in browser.requests)
    finally:
        browser.close()
