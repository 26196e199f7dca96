"""Pages from templates: everything that comes from data is escaped, and a template's undefined name is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from trainer.results.report.drawing import COLOURS
from trainer.terminal import for_terminal


def _without_controls(value: object) -> object:
    return for_terminal(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render_page(template: str, **values: object) -> str:
    """The page as HTML. Templates also get `colours`, and the filter `picture`, which writes a picture's SVG."""
    environment = Environment(
        loader=PackageLoader("trainer.results.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=_without_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = lambda picture: Markup(
        picture.svg
    )  # from drawing.py, whose XML writer escapes all text
    colours = {name: {"light": light, "dark": dark} for name, (light, dark) in COLOURS.items()}
    environment.globals["colours"] = colours
    return environment.get_template(template).render(**values)
