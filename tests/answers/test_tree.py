"""Answer trees against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.answer_tree import Score
from trainer.answers.tree import AnswerError, build_tree, task_tree
from trainer.batch import AnswerTrie
from trainer.tasks import BUILT_IN
from trainer.text import encode

END = 0


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def beginnings(trie: AnswerTrie) -> list[tuple[int, ...]]:
    """Of every place of a trie: the tokens before it."""
    return [(), *(tuple(trie.token_N[row].tolist()) for row in trie.ancestors_NN)]


def logits(before: tuple[int, ...]) -> np.ndarray:
    """Of a language model of 128 tokens."""
    return np.random.default_rng([7, *before]).normal(0, 3, 128)


def by_table(trie: AnswerTrie) -> np.ndarray:
    """[C]: the scores as a model adds them up that knows the trie alone."""
    at = beginnings(trie)
    options: list[float] = []
    for place, option_W, mask_W in zip(trie.place_Q.tolist(), trie.option_QW, trie.mask_QW, strict=True):
        found = logits(at[place])
        listed = found[trie.token_m[option_W].numpy()]
        among = listed[mask_W.numpy()] if trie.constrained else found
        options += (listed - logsumexp(among)).tolist()
    return np.array([sum([*options, 0.0][i] for i in row) for row in trie.step_CD.tolist()])


def by_definition(answers: list[str], score: Score) -> np.ndarray:
    rows = [(*letters(answer), END) for answer in answers]
    out = []
    for row in rows:
        total = 0.0
        for i, token in enumerate(row):
            found = logits(row[:i])
            following = list({other[i] for other in rows if other[:i] == row[:i]})
            total += found[token] - logsumexp(found if score == "full" else found[following])
        out.append(total)
    return np.array(out)


ANSWERS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=2, max_size=12, unique=True)


@settings(max_examples=80, deadline=None)
@given(ANSWERS, st.sampled_from(["full", "constrained"]), st.booleans())
def test_scores_are_those_of_the_definition(answers: list[str], score: Score, every_node: bool) -> None:
    trie = build_tree(answers, letters, END).trie(score, every_node=every_node)
    assert trie.answers == answers
    assert by_table(trie) == pytest.approx(by_definition(answers, score), abs=1e-9)
    if score == "constrained":
        assert np.exp(by_table(trie)).sum() == pytest.approx(1.0)


@settings(max_examples=80, deadline=None)
@given(ANSWERS)
def test_rows_carry_every_node_that_is_needed_once_and_no_other(answers: list[str]) -> None:
    tree = build_tree(answers, letters, END)
    every = {answer[:i] for answer in answers for i in range(1, len(answer) + 1)}
    of = {node: {a[len(node) : len(node) + 1] for a in answers if a.startswith(node)} for node in every}
    needed = {node for node in every if any(len(of[deeper]) > 1 for deeper in every if deeper.startswith(node))}
    for trie, expected in (
        (tree.trie("full"), every),
        (tree.trie("constrained"), needed),
        (tree.trie("constrained", every_node=True), every),
    ):
        nodes = ["".join(map(chr, node)) for node in beginnings(trie)[1:]]
        assert len(nodes) == len(expected)
        assert set(nodes) == expected
        assert trie.depth == max(map(len, nodes), default=0)
        assert trie.depth_N.tolist() == [len(node) - 1 for node in nodes]
        for i, node in enumerate(nodes):
            assert [nodes[j] for j in torch.nonzero(trie.ancestors_NN[i]).flatten()] == [
                node[:stop] for stop in range(1, len(node) + 1)
            ]


def test_answers_that_differ_in_their_first_token_need_no_node() -> None:
    trie = build_tree(["joy", "anger", "fear"], letters, END).trie("constrained")
    assert trie.token_N.tolist() == []
    assert trie.place_Q.tolist() == [0]
    assert trie.token_m.tolist() == letters("jaf")


def test_an_answer_may_begin_another() -> None:
    tree = build_tree(["sad", "sadness"], letters, END)
    assert len(tree.trie("full").token_N) == 7
    trie = tree.trie("constrained")
    assert [chr(token) for token in trie.token_N] == list("sad")
    assert trie.token_m[trie.option_QW].tolist() == [[END, ord("n")]]


@pytest.mark.parametrize("score", ["full", "constrained"])
def test_answers_about_a_label_are_conditional_on_it(score: Score) -> None:
    """Labels that begin another, or another's answer: only a label's own two answers are its options."""
    labels = ["joy", "joyful", "joy: yes, sir"]
    answers = [f"{label}: {word}" for label in labels for word in ("yes", "no")]
    trie = replace(build_tree(answers, letters, END), pairs=True).trie(score)
    expected = []
    for c, answer in enumerate(answers):
        given = len(answer.rpartition(" ")[0]) + 1
        for i in range(given, len(answer) + 1):
            row = (*letters(answer), END)
            found = logits(row[:i])
            pair = [(*letters(other), END) for other in answers[c // 2 * 2 : c // 2 * 2 + 2]]
            following = list({other[i] for other in pair if other[:i] == row[:i]})
            expected.append((c, found[row[i]] - logsumexp(found if score == "full" else found[following])))
    total = [sum(value for at, value in expected if at == c) for c in range(len(answers))]
    assert by_table(trie) == pytest.approx(np.array(total), abs=1e-9)


def test_answers_that_cannot_be_told_apart_are_named_together():
    table = {"joy": [5, 6], "glee": [5, 6], "calm": [], "rage": [7, END]}
    with pytest.raises(AnswerError) as error:
        build_tree(list(table), table.__getitem__, END)
    text = str(error.value)
    assert "'joy' and 'glee' have the same tokens [5, 6]" in text
    assert "'calm' has no tokens" in text
    assert "'rage' holds the end token 0" in text


def test_a_repeated_answer_and_no_answers_are_refused():
    with pytest.raises(AnswerError, match="'joy' and 'joy'"):
        build_tree(["joy", "joy"], letters, END)
    with pytest.raises(AnswerError, match="there are none"):
        build_tree([], letters, END)


@pytest.fixture(scope="module")
def tokenizer():
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ne", "sad", "</s>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("n", "e")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("style", ["words", "indices"])
def test_a_tree_scores_the_tokens_that_training_teaches(tokenizer, name, language, style):
    task = BUILT_IN[name]
    tree = task_tree(task, tokenizer, style, language)
    assert list(tree.answers) == list(task.answers(style))
    assert tree.end == tokenizer.eos_token_id
    for (*tokens, last), text in zip(tree.tokens, task.answer_texts(style, language), strict=True):
        assert tokens == encode(tokenizer, text)
        assert tokenizer.decode(tokens) == text
        assert last == tree.end
    values = tree.trie("full").value_C
    assert (values is None) == (task.grid is None)
    assert values is None or values.tolist() == pytest.approx(list(task.grid.values))


def test_numbers_of_a_grid_need_few_nodes(tokenizer):
    """The sign, the digits before the point and the point behind some of them; not what follows the last choice."""
    trie = task_tree(BUILT_IN["mosei"], tokenizer, "words", "en").trie("constrained")
    nodes = {tokenizer.decode(list(before)).strip() for before in beginnings(trie)[1:]}
    numbers = {f"{sign}{digit}{point}" for sign in ("", "-") for digit in "012" for point in ("", ".")}
    assert nodes - {""} == numbers | {"-"}
