"""Options with several values or an optional one, which argparse knows (``nargs="+"``, ``nargs="?"``) and click does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand


def command_class(
    *,
    several: Sequence[str] = (),
    optional: Mapping[str, str] | None = None,
    following: Mapping[str, str] | None = None,
) -> type[TyperCommand]:
    """The class of a command, for typer's ``cls``, whose options take values as argparse's do.

    Args:
        several: options that take all words up to the next option, once the command's first argument stands before them
            (``prepare TASK --source A B C``); declared with a list type.
        optional: option -> the value that it has alone; another one is joined by ``=`` (``--drop-bad=all``).
        following: the same, and the next word is the value too, once the command's first argument stands before the option,
            unless it is another option or ``key=value`` (``sweep CONFIG --folds 1,3 train.steps=9``).
    """
    alone, next_word = dict(optional or {}), dict(following or {})

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            words = [f"{word}={alone[word]}" if word in alone else word for word in args]
            words = _join_following(words, next_word)
            if words and not words[0].startswith("-"):
                words = _repeat_options(words, several)
            return super().parse_args(ctx, words)

    return Command


def _join_following(words: Sequence[str], alone: Mapping[str, str]) -> list[str]:
    """``--folds 1,3`` as ``--folds=1,3``, and ``--folds`` as ``--folds=all``."""
    joined: list[str] = []
    open_option = ""
    for word in words:
        if open_option:
            is_value = not word.startswith("-") and "=" not in word and not words[0].startswith("-")
            joined.append(f"{open_option}={word if is_value else alone[open_option]}")
            open_option = ""
            if is_value:
                continue
        if word in alone:
            open_option = word
        else:
            joined.append(word)
    return [*joined, *([f"{open_option}={alone[open_option]}"] if open_option else [])]


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
