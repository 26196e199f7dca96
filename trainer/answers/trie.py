"""The answers of a task as a tree of tokens, which the model scores in one pass.

Legend: C answers of the task, N nodes of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from trainer.batch import AnswerTrie
from trainer.tasks import AnswerStyle, Language, Task
from trainer.text import Joining, Pieces, end_token


class AnswerError(ValueError):
    """Answers that a tokenizer cannot tell apart, or scores that do not belong to the task's answers."""


def task_trie(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    style: AnswerStyle,
    language: Language,
    joining: Joining = "running",
) -> AnswerTrie:
    """The tree of a task's answers as they follow the cue in a prompt of `language`, tokenised as in training
    (:class:`trainer.text.Pieces`); see :func:`build_trie`."""
    pieces = Pieces(tokenizer, joining)
    trie = build_trie(task.answer_texts(style, language), pieces.following, end_token(tokenizer))
    if task.grid is not None:
        trie.value_C = torch.tensor(task.grid.values)
    if task.kind == "multilabel":
        trie.given_N = _given(trie)
    return trie


def _given(trie: AnswerTrie) -> torch.Tensor:
    """`[N]`: the nodes above both answers of a label, which stand one behind the other."""
    path_CN = trie.ancestors_NN[trie.leaf_C]
    return (path_CN[0::2] & path_CN[1::2]).any(0)


def build_trie(answers: Sequence[str], encode: Callable[[str], list[int]], end: int) -> AnswerTrie:
    """One tree that holds every answer: shared beginnings once, parents before children, answers in the given order.

    Args:
        answers: the texts as they follow the cue (:meth:`trainer.tasks.Task.answer_texts`), tokenised apart from it.
        encode: text -> tokens, adding none.
        end: the token that ends every answer; it tells an answer from a longer one that begins with it.

    Raises:
        AnswerError: naming every answer without tokens, with the end token inside, or with the tokens of another.
    """
    tokens = [list(map(int, encode(text))) for text in answers]
    _check_tokens(answers, tokens, end)
    nodes: dict[tuple[int, ...], int] = {}
    for row in tokens:
        for stop in range(1, len(row) + 1):
            nodes.setdefault(tuple(row[:stop]), len(nodes))
    parents = [nodes.get(path[:-1], -1) for path in nodes]
    ancestors_NN = torch.eye(len(nodes), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors_NN[node] |= ancestors_NN[parent]
    return AnswerTrie(
        token_N=torch.tensor([path[-1] for path in nodes]),
        parent_N=torch.tensor(parents),
        depth_N=torch.tensor([len(path) - 1 for path in nodes]),
        leaf_C=torch.tensor([nodes[tuple(row)] for row in tokens]),
        ancestors_NN=ancestors_NN,
        end=end,
        answers=[text.strip() for text in answers],
    )


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
