"""Drawing pictures: an SVG that takes the page's colours and fonts, and a PNG of the same for use outside the page.

In the SVG all text stays text, so that the reader's own fonts show it, and every colour is a variable of the page's style,
so that one picture serves light and dark. The PNG is drawn with the light colours on white; where no installed font has
a label's characters, a stand-in is written in its place and listed in :attr:`Picture.stand_ins`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from trainer.results.printable import printable

# name of the page's variable -> (light, dark). The light ones are drawn with, and found again in the SVG.
COLOURS = {
    "paper": ("#ffffff", "#0f141b"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#57606a", "#9aa7b5"),
    "line": ("#d0d7de", "#323b46"),
    "blue": ("#0a66c2", "#5aa9ff"),
    "orange": ("#b35009", "#f0913e"),
    "green": ("#187a37", "#48bf5f"),
    "purple": ("#7d4ed8", "#bd93ff"),
    "red": ("#c9202e", "#ff7d76"),
    "teal": ("#0b7285", "#4cc3d9"),
}
PAPER, INK, MUTED, LINE, BLUE, ORANGE, GREEN, PURPLE, RED, TEAL = (light for light, _ in COLOURS.values())
SERIES = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED)

SIZE = (4.8, 3.0)  # inches
DPI = 160  # of the PNG
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "path.simplify": True,
}
# files of fonts that have Chinese characters, by how their names begin, the preferred first
CHINESE_FONTS = (
    "notosanscjk-regular", "notosanscjksc", "notosanssc", "sourcehansans", "wqy-microhei", "wqy-zenhei", "msyh", "simhei",
    "pingfang", "hiragino sans gb", "stheiti", "droidsansfallback", "uming", "ukai", "simsun",
)  # fmt: skip
ENGLISH = {
    "愤怒": "anger",
    "厌恶": "disgust",
    "恐惧": "fear",
    "高兴": "joy",
    "平静": "calm",
    "悲伤": "sadness",
    "惊奇": "surprise",
}

Names = Callable[[str], str]
Draw = Callable[[Figure, Names], None]


@dataclass(frozen=True)
class Picture:
    """A picture. `alt` describes it for screen readers, `caption` says how to read it."""

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    png: bytes
    stand_ins: dict[str, str] = field(default_factory=dict)  # label -> what the PNG has in its place


def render(
    name: str,
    title: str,
    draw: Draw,
    *,
    alt: str,
    caption: str = "",
    labels: Sequence[str] = (),
    size: tuple[float, float] = SIZE,
    as_png: bool = True,
) -> Picture:
    """The picture that `draw` draws: it gets an empty figure, and a function from a label to the text to write for it.

    Args:
        labels: those that need a stand-in where the PNG's fonts lack their characters.
        as_png: false for the SVG alone, in half the time.
    """
    stand_ins = {label: other for label, other in _stand_ins(labels).items() if other != label}
    svg = _themed(_save(draw, printable, "svg", size), name, title, alt)

    def written(label: str) -> str:
        return stand_ins.get(label, printable(label))

    png = _save(draw, written, "png", size, title) if as_png else b""
    return Picture(name, title, alt, caption, svg, png, stand_ins)


def _save(draw: Draw, names: Names, kind: str, size: tuple[float, float], title: str | None = None) -> bytes:
    families = ["DejaVu Sans", *([_family(font)] if (font := chinese_font()) else [])]
    with matplotlib.rc_context({**STYLE, "font.family": families}), warnings.catch_warnings():
        if kind == "svg":  # the reader's fonts have what the installed ones lack
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, names)
        if title:
            figure.suptitle(title, fontsize=10.5)
        buffer = io.BytesIO()
        if kind == "svg":
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=no_metadata)
        else:
            figure.savefig(buffer, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def _themed(svg: bytes, name: str, title: str, alt: str) -> str:
    """An SVG element for a page: colours as variables, the page's fonts, unique ids, title and description for screen readers."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                value = f"{name}-{value}"
            elif key.endswith("href") and value.startswith("#"):
                key, value = "href", f"#{name}-{value[1:]}"
            elif key == "clip-path":
                value = value.replace("url(#", f"url(#{name}-")
            elif key == "style":
                value = _themed_style(value)
            element.attrib[key.rpartition("}")[2]] = value
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    width, height = (float(root.attrib.pop(side).removesuffix("pt")) for side in ("width", "height"))
    root.attrib |= {
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-alt",
        "viewBox": f"0 0 {width:g} {height:g}",
    }
    for index, (tag, text) in enumerate((("title", title), ("desc", alt))):
        element = ElementTree.Element(tag, id=f"{name}-{'title' if tag == 'title' else 'alt'}")
        element.text = printable(text)
        root.insert(index, element)
    return ElementTree.tostring(root, encoding="unicode")


def _themed_style(style: str) -> str:
    kept = [part for part in style.split("; ") if not part.startswith("font-family")]
    out = "; ".join(kept)
    for name, (light, _) in COLOURS.items():
        out = out.replace(light, f"var(--{name})")
    return out


def _stand_ins(labels: Sequence[str]) -> dict[str, str]:
    """What a PNG writes for each label: itself, where the fonts have its characters; its English name; or its number."""
    return {
        label: printable(label) if can_draw(label) else ENGLISH.get(label, f"class {i}")
        for i, label in enumerate(labels, start=1)
    }


def can_draw(text: str) -> bool:
    """Whether the fonts that pictures are drawn with have every character of `text`."""
    fonts = [font_manager.findfont("DejaVu Sans"), *([font] if (font := chinese_font()) else [])]
    return {ord(c) for c in printable(text)} <= set().union(*map(_characters, fonts))


def chinese_font() -> str | None:
    """The file of an installed font with Chinese characters, None where there is none."""
    return _chinese_among(tuple(font_manager.findSystemFonts()))


@lru_cache(maxsize=4)
def _chinese_among(files: Iterable[str]) -> str | None:
    by_name = {Path(file).name.lower(): file for file in files}
    for start in CHINESE_FONTS:
        for name in sorted(by_name):
            if name.startswith(start):
                font_manager.fontManager.addfont(by_name[name])
                return by_name[name]
    return None


@lru_cache(maxsize=8)
def _family(font: str) -> str:
    return str(FT2Font(font).family_name)


@lru_cache(maxsize=8)
def _characters(font: str) -> frozenset[int]:
    return frozenset(FT2Font(font).get_charmap())


def axes(figure: Figure, xlabel: str, ylabel: str | None) -> Axes:
    """The figure's only axes, labelled; ``step`` on the x axis has whole numbers."""
    ax = figure.add_subplot()
    ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)
    if xlabel == "step":
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return ax


def heat_map(
    ax: Axes,
    strength: np.ndarray,
    texts: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[str],
    write: bool = True,
) -> None:
    """A table whose cells are the bluer the larger their `strength` (0 to 1), with `texts` written into them."""
    for i, j in np.ndindex(strength.shape):
        alpha = 0.55 * float(np.clip(strength[i, j], 0, 1))  # dark and light text stay readable on it
        ax.add_patch(Rectangle((j, i), 1, 1, facecolor=(BLUE, alpha), edgecolor=PAPER))
        if write:
            ax.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center", fontsize=9 if len(columns) <= 8 else 7)
    long = max(map(len, columns)) * len(columns) > 48
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35 if long else 0, ha="right" if long else "center")
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    ax.tick_params(length=0)
    ax.grid(False)
