"""The tree of a task's answers, from their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from trainer.answer_tree import AnswerTree
from trainer.tasks import AnswerStyle, Language, Task
from trainer.text import Joining, Pieces, end_token


class AnswerError(ValueError):
    """Answers that a tokenizer cannot tell apart, or scores that do not belong to the task's answers."""


def task_tree(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    style: AnswerStyle,
    language: Language,
    joining: Joining = "running",
) -> AnswerTree:
    """The tree of a task's answers as they follow the cue in a prompt of `language`, tokenised as in training
    (:class:`trainer.text.Pieces`); errors as of :func:`build_tree`."""
    pieces = Pieces(tokenizer, joining)
    tree = build_tree(task.answer_texts(style, language), pieces.following, end_token(tokenizer))
    return replace(tree, values=None if task.grid is None else task.grid.values, pairs=task.kind == "multilabel")


def build_tree(answers: Sequence[str], encode: Callable[[str], list[int]], end: int) -> AnswerTree:
    """The tree of all answers.

    Args:
        answers: the texts as they follow the cue (:meth:`trainer.tasks.Task.answer_texts`), tokenised apart from it.
        encode: text -> tokens, adding none.
        end: the token that ends every answer; it tells an answer from a longer one that begins with it.

    Raises:
        AnswerError: naming every answer without tokens, with the end token inside, or with the tokens of another.
    """
    tokens = [list(map(int, encode(text))) for text in answers]
    _check_tokens(answers, tokens, end)
    return AnswerTree(tuple(text.strip() for text in answers), tuple((*row, end) for row in tokens))


def _check_tokens(answers: Sequence[str], tokens: Sequence[Sequence[int]], end: int) -> None:
    faults = [] if answers else ["there are none"]
    seen: dict[tuple[int, ...], int] = {}
    for c, (text, row) in enumerate(zip(answers, tokens, strict=True)):
        if not row:
            faults.append(f"{text!r} has no tokens")
        elif end in row:
            faults.append(f"{text!r} holds the end token {end}: its tokens are {row}")
        elif (other := seen.setdefault(tuple(row), c)) != c:
            faults.append(f"{answers[other]!r} and {text!r} have the same tokens {row}")
    if faults:
        raise AnswerError(
            "the tokenizer cannot tell these answers apart: "
            + "; ".join(faults)
            + ". Rename the labels, or let the model answer with their numbers (data.answers=indices)"
        )
