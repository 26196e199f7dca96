"""Text of others, made fit to be shown."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """`text` on one line, what is neither printable nor a space replaced: fit for a terminal and for XML."""
    return "".join(" " if c.isspace() else c if unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)
