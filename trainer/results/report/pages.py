"""A page from a template: everything that comes from data is escaped, and a name that the template lacks is a fault."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from trainer.results.report.drawing import COLOURS


def render_page(template: str, **values: Any) -> str:
    """The page as HTML. Templates also get `colours`, and the filter `picture`, which writes a picture's SVG."""
    environment = Environment(
        loader=PackageLoader("trainer.results.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = lambda picture: Markup(picture.svg)  # drawn here, its texts escaped by the writer
    colours = {name: {"light": light, "dark": dark} for name, (light, dark) in COLOURS.items()}
    environment.globals["colours"] = colours
    return environment.get_template(template).render(**values)
