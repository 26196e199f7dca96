"""Options with several values or an optional one, which argparse knows (``nargs="+"``, ``nargs="?"``) and click does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand


def command_class(*, several: Sequence[str] = (), optional: Mapping[str, str] | None = None) -> type[TyperCommand]:
    """The class of a command, for typer's ``cls``, whose options take values as argparse's do.

    Args:
        several: options that take all words up to the next option, once the command's first argument stands before them
            (``prepare TASK --source A B C``); declared with a list type.
        optional: option -> the value that it has alone; another one is joined by ``=`` (``--drop-bad=all``).
    """
    alone = dict(optional or {})

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            words = [f"{word}={alone[word]}" if word in alone else word for word in args]
            if words and not words[0].startswith("-"):
                words = _repeat_options(words, several)
            return super().parse_args(ctx, words)

    return Command


def _repeat_options(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """``--source A B`` as ``--source A --source B``."""
    repeated: list[str] = []
    open_option = ""  # whose values are being read
    for word in words:
        if word.startswith("-"):
            open_option = word if word in options else ""
        elif open_option and repeated[-1] != open_option:
            repeated.append(open_option)
        repeated.append(word)
    return repeated
