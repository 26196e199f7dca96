"""Answer trees against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.answers.trie import AnswerError, build_trie, task_trie
from trainer.tasks import BUILT_IN
from trainer.text import encode

END = 0


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def path(trie, c: int) -> list[int]:
    node, nodes = int(trie.leaf_C[c]), []
    while node >= 0:
        nodes.append(node)
        node = int(trie.parent_N[node])
    return nodes[::-1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=12, unique=True))
def test_a_trie_holds_every_answer_and_each_beginning_once(answers):
    trie = build_trie(answers, letters, END)
    assert trie.answers == answers
    assert trie.end == END
    assert len(trie.token_N) == len({a[:i] for a in answers for i in range(1, len(a) + 1)})
    assert (trie.parent_N < torch.arange(len(trie.token_N))).all()
    for c, answer in enumerate(answers):
        nodes = path(trie, c)
        assert [chr(t) for t in trie.token_N[nodes]] == list(answer)
        assert trie.depth_N[nodes].tolist() == list(range(len(answer)))
        for i, node in enumerate(nodes):
            assert torch.nonzero(trie.ancestors_NN[node]).flatten().tolist() == nodes[: i + 1]


def test_an_answer_may_begin_another():
    trie = build_trie(["sad", "sadness"], letters, END)
    assert path(trie, 0) == path(trie, 1)[:3]
    assert len(trie.token_N) == 7


def test_answers_that_cannot_be_told_apart_are_named_together():
    table = {"joy": [5, 6], "glee": [5, 6], "calm": [], "rage": [7, END]}
    with pytest.raises(AnswerError) as error:
        build_trie(list(table), table.__getitem__, END)
    text = str(error.value)
    assert "'joy' and 'glee' have the same tokens [5, 6]" in text
    assert "'calm' has no tokens" in text
    assert "'rage' holds the end token 0" in text


def test_a_repeated_answer_and_no_answers_are_refused():
    with pytest.raises(AnswerError, match="'joy' and 'joy'"):
        build_trie(["joy", "joy"], letters, END)
    with pytest.raises(AnswerError, match="there are none"):
        build_trie([], letters, END)


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
    trie = task_trie(task, tokenizer, style, language)
    assert trie.answers == list(task.answers(style))
    for c, text in enumerate(task.answer_texts(style, language)):
        tokens = trie.token_N[path(trie, c)].tolist()
        assert tokens == encode(tokenizer, text)
        assert tokenizer.decode(tokens) == text
    assert trie.end == tokenizer.eos_token_id
