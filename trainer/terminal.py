"""Text for terminals and logs: what files, host names and servers say must not move the cursor or change its colours."""

from __future__ import annotations

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # all but tab and line feed; and changes of direction


def for_terminal(text: str) -> str:
    """`text` with control characters written out, ``\\x1b`` for an escape; line feeds and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
