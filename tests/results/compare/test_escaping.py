"""Hostile names of groups, as somebody else's runs may bring them, in every form of a comparison."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.results.seeded import make_seeded, make_two
from trainer.results.compare import output
from trainer.results.compare.comparison import _named, compare
from trainer.results.compare.groups import Group
from trainer.results.compare.page import page
from trainer.results.compare.result import Comparison
from trainer.results.compare.sources.find import find_runs
from trainer.terminal import literal_console

NAMES = (
    "=cmd|' /C calc'!A0",
    "[bold red]owned[/] :smile:\x1b[31m\x07",
    "*[1cm] \\input{/etc/passwd} 50% $x_1^2$ a&b #1 ~ <b>",
)


@pytest.fixture(scope="module", params=[NAMES, ("+1+1", "@SUM(A1)\r\n=1", " =1+1"), ("\t=1", "-2+3", "＝1\u202e")])
def compared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Comparison, list[str]]:
    folder = tmp_path_factory.mktemp("hostile")
    make_two(folder / "runs")
    make_seeded(folder / "runs" / "third", 3, 0.7, ["model.fusion.width=64"])
    runs = find_runs([str(folder / "runs")], ["test"]).runs
    names = dict(zip(dict.fromkeys(run.name[:4] for run in runs), request.param, strict=True))
    for run in runs:
        run.group = names[run.name[:4]]
    return compare(runs, baseline=request.param[0]), list(request.param)


def test_csv_holds_no_formula(compared: tuple[Comparison, list[str]]) -> None:
    comparison, names = compared
    rows = list(csv.DictReader(io.StringIO(output.as_csv(comparison), newline="")))
    groups = {row["group"] for row in rows}
    assert len(groups) == len(names)
    for row in rows:
        for cell in row.values():
            if cell.strip()[:1] in "=+@＝＋＠":
                assert cell == ""
            if cell.startswith("-"):
                assert all(map(float, cell.split())), "numbers alone begin so"
            assert not set(cell) & set("\x1b\x07\r\n\t")


def test_tex_holds_no_command_of_theirs(compared: tuple[Comparison, list[str]]) -> None:
    text = output.as_tex(compared[0])
    allowed = {
        "toprule",
        "midrule",
        "bottomrule",
        "begin",
        "end",
        "pm",
        "times",
        "ldots",
        "textbackslash",
        "usepackage",
    }
    allowed |= {"textasciitilde", "textasciicircum", "textbar"}
    assert set(re.findall(r"\\([A-Za-z]+)", text)) <= allowed
    for table in text.split("\\midrule\n")[1:]:
        rows = table.split("\\bottomrule")[0].splitlines()
        width = rows[0].count(" & ")
        for row in rows:
            assert row.endswith(" \\\\")
            assert row.count(" & ") == width
            assert row.lstrip()[:1] not in ("[", "*"), "the line break before it takes it for an argument"
            bare = re.sub(r"\\.", "", row.removesuffix(" \\\\"))  # without what is escaped
            assert not set(bare.replace(" & ", "").replace("$-$", "").replace("$\\pm$", "").replace("$", "")) & set(
                "%#_~^&"
            )
            assert bare.count("$") % 2 == 0
            assert bare.count("{") == bare.count("}")


def test_the_terminal_shows_names_as_they_are(compared: tuple[Comparison, list[str]]) -> None:
    comparison, names = compared
    console = literal_console(width=400)
    with console.capture() as shown:
        console.print(output.terminal(comparison))
    assert not set(shown.get()) & set("\x1b\x07\r\u202e")
    if names == list(NAMES):
        assert "[bold red]owned[/] :smile:" in shown.get()
        assert f"Differences from {names[0]}" in shown.get()


def test_the_page_holds_no_element_of_theirs(compared: tuple[Comparison, list[str]]) -> None:
    seen = set()

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.add(tag)
            assert not [name for name, _ in attrs if name.startswith("on")]

    text = page(compared[0])
    Elements().feed(text)
    assert not seen & {"script", "b", "iframe", "img", "object", "input"}
    assert not set(text) & set("\x1b\x07\r\u202e")


def test_a_baseline_goes_by_the_value_of_its_setting() -> None:
    """A group that is exactly this value is meant, although others hold it too."""
    values = {"model.fusion.modalities": ["[text]", "[text, audio]", "[text, audio, video]"]}
    groups = [Group(f"modalities={value}", {key: value}, [], []) for key, some in values.items() for value in some]
    assert _named(groups, "modalities=[text]") is groups[0]
    assert _named(groups, "text") is groups[0]
    assert _named(groups, "text,audio") is groups[1]
    assert _named(groups, "[text, audio]") is groups[1]
    assert _named(groups, "video") is groups[2]
    with pytest.raises(ValueError, match=r"matches 2 groups"):
        _named(groups, "audio")


def test_consoles_are_literal_everywhere() -> None:
    """Other consoles take ``[text]`` for markup."""
    root = Path(__file__).parent.parent.parent.parent
    sources = [path for room in ("trainer", "launch") for path in (root / room).rglob("*.py")]
    assert [p for p in sources if re.search(r"(?<!Literal)Console\(", p.read_text()) and p.name != "terminal.py"] == []
