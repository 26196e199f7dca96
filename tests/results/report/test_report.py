"""The page and its pictures: whole on any run folder, self-contained, everything of the data escaped."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from tests.results.made import make_run
from trainer.data.preparation.prepare import prepare
from trainer.results.analysis import analyse
from trainer.results.report import drawing
from trainer.results.report.prediction_pictures import task_pictures
from trainer.results.report.report import write_report
from trainer.results.report.training_pictures import POINTS, loss, thin
from trainer.results.run_folder import read_run
from trainer.results.show import run_json, show_run
from trainer.results.tables import environment
from trainer.tasks import get_task

LIMIT = 2_000_000  # bytes of a page
VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """A page read back: its elements with their attributes, its text, and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_finished_run_has_everything(reported: Path) -> None:
    run = reported
    written = sorted((run / "report").iterdir())
    assert {path.suffix for path in written} == {".png"}
    assert not [path for path in written if path.name.startswith(".")]
    names = {path.stem for path in written}
    assert {"loss", "learning-rate", "validation", "gate-usage", "gradient-norm"} <= names
    assert {f"{name}-{task}" for name in ("confusion", "confusion-shares") for task in ("meld", "cherma")} <= names
    assert {"scatter-simsv2", "residuals-simsv2"} <= names
    for task in ("meld", "cherma", "simsv2"):
        assert {f"calibration-{task}", f"gate-experts-{task}", f"gate-modalities-{task}", f"gate-class-{task}"} <= names
    assert "gate-kind-meld" in names
    assert "left-over" not in names
    for path in written:
        with Image.open(path) as image:
            image.verify()
            assert image.width >= 700
    assert (run / "report.html").stat().st_size < LIMIT
    page = Page(run / "report.html")
    assert len(page.all("svg")) == len(written)
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for word in (
        "愤怒",
        "majority class of train",
        "Answered worst",
        "red",
        "说",
        "0123abc",
        "global_batch: 32",
        "step-00000020",
    ):
        assert word in page.text, word
    assert "Not on this page" not in page.text


def test_every_picture_has_a_text_description(reported: Path) -> None:
    page = Page(reported / "report.html")
    ids = {a["id"] for _, a in page.elements if a.get("id")}
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= ids
    assert "30 at step 1, 0.75 at step 40" in page.text
    assert "1 steps skipped, 1 spikes" in page.text


def test_the_page_refers_to_nothing_outside(reported: Path) -> None:
    page = Page(reported / "report.html")
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("href", "src", "xlink:href"):
                assert str(value).startswith(("#", "data:")), (tag, value)
            if value and "url(" in value:
                assert "url(#" in value, (tag, value)
    assert "@import" not in page.text
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


NASTY = "<script>window.hacked=1</script>\x1b[31m & \"quotes\" 'single' {{ 7*7 }} </svg><b>x"


def test_texts_and_labels_of_the_data_are_data(tmp_path: Path) -> None:
    samples = [
        {"id": f"{split}-{i}", "text": f"{NASTY} {i}", "label": ("calm", NASTY[:32])[i % 2], "split": split}
        for split in ("train", "valid", "test")
        for i in range(6)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        json.dumps({"name": "mine", "kind": "classification", "labels": ["calm", NASTY[:32]]})
    )
    prepare(get_task(str(tmp_path / "mine.yaml")), [tmp_path / "samples.jsonl"], tmp_path / "mine")
    run = make_run(tmp_path / "run", tmp_path, ("meld",), failure=NASTY, state="failed")
    _as_task(run, tmp_path / "mine.yaml")
    write_report(run)
    page = Page(run / "report.html")
    assert not page.all("script")
    assert not page.all("b")
    assert f"{NASTY[:32]}" in page.text
    assert "{{ 7*7 }}" in page.text
    terminal = Console(file=io.StringIO(), width=240)
    terminal.print(show_run(run))
    printed = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in printed
    assert "<script>window.hacked=1</script>" in printed


def _as_task(run: Path, task: Path) -> None:
    """Make the run one of the task `mine`, whose dataset lies beside it."""
    fingerprint = json.loads((task.parent / "mine" / "record.json").read_text())["fingerprint"]
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("task: meld", f"task: {task}"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "tasks": ["mine"], "data": {"mine": fingerprint}}))
    (run / "metrics.json").unlink()
    (run / "predictions" / "valid.parquet").unlink()
    labels = ["calm", NASTY[:32]]
    pd.DataFrame(
        {
            "task": "mine", "id": [f"test-{i}" for i in range(6)], "label": [labels[i % 2] for i in range(6)],
            "prediction": labels[1], "valid": True, "answer": labels[1], "probabilities": [[0.25, 0.75]] * 6,
        }
    ).to_parquet(run / "predictions" / "test.parquet")  # fmt: skip


DAMAGE: dict[str, list[str]] = {
    "config.yaml": ["the config cannot be read"],
    "run.json": ["run.json is damaged"],
    "metrics.json": ["metrics.json is damaged"],
    "journal.jsonl": ["journal.jsonl has no metrics"],
    "predictions/test.parquet": ["predictions/test.parquet is damaged"],
    "checkpoints/best": [],
}


@pytest.fixture
def without_pngs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take half the time: a page has the SVGs alone."""
    monkeypatch.setattr(
        drawing,
        "_save",
        lambda draw, names, kind, *more, own=drawing._save: b"" if kind == "png" else own(draw, names, kind, *more),
    )


@pytest.mark.usefixtures("without_pngs")
@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("how", ["cut", "garbage", "empty", "gone"])
def test_damaged_and_missing_files_are_notes_and_the_rest_is_reported(
    name: str, how: str, meld: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(meld)
    path = run / name
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(
            {"cut": content[: len(content) * 2 // 3], "garbage": b"\xff\xfe{[\x00" * 40, "empty": b""}[how]
        )
    results = run_json(run)
    show_run(run)
    json.dumps(results, allow_nan=False)
    if how == "garbage":
        write_report(run)
        page = Page(run / "report.html")
        for words in DAMAGE[name]:
            assert any(words in note for note in results["notes"]), results["notes"]
            assert words in page.text


def test_a_run_that_has_just_started(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: cherma\ntrain: {steps: 100}\n")
    assert write_report(run) == []
    (run / "run.json").write_text('{"state": "running"}')
    (run / "journal.jsonl").write_text('{"step": 1, "time": 0, "metrics": {"train/loss": 2.5}}\n{"step": 2, "ti')
    assert [path.name for path in write_report(run)] == ["loss.png"]
    text = Page(run / "report.html").text
    assert "1 of 100" in text
    assert "no predictions yet" in text
    for ask in (write_report, show_run, run_json):
        with pytest.raises(ValueError, match="not a run folder"):
            ask(tmp_path / "none")


def test_a_run_without_fusion_and_one_that_generates(meld: Path, copy: Callable[[Path], Path]) -> None:
    run = copy(meld)
    path = run / "predictions" / "test.parquet"
    pd.read_parquet(path).drop(columns=["gate_expert", "gate_modality", "kind", "probabilities"]).to_parquet(path)
    names = {path.stem for path in write_report(run)}
    assert {"confusion", "loss"} <= names
    assert not {name for name in names if name.startswith(("gate-experts", "gate-class", "calibration"))}
    show_run(run)


def test_chinese_labels_in_pngs_with_and_without_a_chinese_font(unified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures() -> list[drawing.Picture]:
        found = next(results for results in analyse(read_run(unified)) if results.task.name == "cherma")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of every glyph that a font has not
            return task_pictures(found, several=True)

    with monkeypatch.context() as patch:
        patch.setattr(drawing.font_manager, "findSystemFonts", lambda: [])
        without = {picture.name: picture for picture in pictures()}
    confusion = without["confusion-cherma"]
    assert confusion.stand_ins["愤怒"] == "anger"
    assert "愤怒" in confusion.svg  # the reader's own fonts show it
    if drawing.chinese_font() is None:
        pytest.skip("no Chinese font is installed")
    with_font = {picture.name: picture for picture in pictures()}
    assert with_font["confusion-cherma"].stand_ins == {}
    assert with_font["confusion-cherma"].png != confusion.png


def test_a_name_without_english_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.font_manager, "findSystemFonts", lambda: [])
    assert drawing._stand_ins(["calm", "开心"]) == {"calm": "calm", "开心": "class 2"}


def test_text_can_be_read_on_the_strongest_cell_in_light_and_dark() -> None:
    def luminance(color: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def rgb(text: str) -> list[float]:
        return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    for theme in (0, 1):
        paper, ink, blue = (rgb(drawing.COLOURS[name][theme]) for name in ("paper", "ink", "blue"))
        cell = [0.55 * b + 0.45 * p for b, p in zip(blue, paper, strict=True)]
        light, dark = sorted((luminance(cell), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5


def test_a_long_curve_is_drawn_as_means(meld: Path) -> None:
    series = [(step, float(step % 7)) for step in range(1, 10 * POINTS + 4)]
    steps, values = thin(series)
    assert len(steps) <= POINTS
    assert values[0] == pytest.approx(sum(v for _, v in series[:11]) / 11)
    assert steps[-1] <= series[-1][0]
    run = read_run(meld)
    run.journal["train/loss"] = series
    picture = loss(run)
    assert picture is not None
    assert "mean of 11 logged steps" in picture.caption
    assert len(picture.svg) < 150_000


def test_a_failure_while_writing_leaves_the_page_that_was_there(
    meld: Path, copy: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(meld)
    shutil.rmtree(run / "predictions")
    write_report(run)
    before = (run / "report.html").read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_the_environment_names_the_fold(tmp_path: Path, data: Path) -> None:
    fold = {"name": "Ses2", "names": ["Ses1", "Ses2"], "train": 4, "test": 4}
    table = environment(read_run(make_run(tmp_path / "run", data, ("meld",), fold=fold)))
    assert table is not None
    assert ["fold", "Ses2 of Ses1, Ses2"] in table.rows
