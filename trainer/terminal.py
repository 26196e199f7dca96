"""Text for terminals and logs: what files, host names and servers say must not move the cursor or change its colours."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a third of the time that `egmf --help` needs
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # all but tab and line feed; and changes of direction


def for_terminal(text: str) -> str:
    """`text` with control characters written out, ``\\x1b`` for an escape; line feeds and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def literal_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console of rich that shows text as it is: ``[bold]`` and ``:smile:`` are text, and control characters are written out."""
    return _literal()(stderr=stderr, width=width, markup=False, emoji=False)


@functools.cache
def _literal() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class LiteralConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(for_terminal(segment.text), segment.style)

    return LiteralConsole
