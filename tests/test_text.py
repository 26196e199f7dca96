"""Pieces of a prompt as tokens: joined they are the tokens of the running text, over the families of tokenizers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tokenizers import FAMILIES, MARKED, in_python
from trainer.answers.tree import AnswerError, build_tree, task_tree
from trainer.batch import Sample
from trainer.config import DataConfig
from trainer.data.collate import Collator, prompt_texts
from trainer.tasks import BUILT_IN
from trainer.text import Pieces, encode, end_token

PROMPT = [
    "Recognise the emotion: joy, anger\n<Multimodal>",
    "Ross: I know that.\n",
    "see there",
    "</>\nEmotion:",
    " joy",
]
ALPHABET = [
    *"joy anger so",
    "know",
    "Ross",
    " ",
    " ",
    "  ",
    "\n",
    ":",
    "-",
    "0",
    "12",
    ".3",
    "</>",
    "'",
    "高兴",
    "情",
    "：",
    "!",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerFast]:
    return request.param, FAMILIES[request.param]()


def running(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], set[int]]:
    """The tokens of a text, and the places in it that stand inside of a token."""
    whole = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    inside = {place for start, end in whole["offset_mapping"] for place in range(start + 1, end)}
    return whole["input_ids"], inside


def joined(pieces: Pieces, texts: list[str]) -> list[int]:
    return pieces.first(texts[0]) + [index for text in texts[1:] for index in pieces.following(text)]


def test_a_prompt_reads_as_running_text(family: tuple[str, PreTrainedTokenizerFast]) -> None:
    name, tokenizer = family
    pieces = Pieces(tokenizer)
    texts = [PROMPT[0], *pieces.connected(PROMPT[1:])]
    assert "".join(texts) == "".join(PROMPT)
    ids = joined(pieces, texts)
    assert ids == running(tokenizer, "".join(texts))[0]
    assert tokenizer.decode(ids) == tokenizer.decode(encode(tokenizer, "".join(texts)))
    assert pieces.marked == (name in MARKED)
    if name in (
        "llama2",
        "metaspace first",
        "metaspace always",
        "gpt2",
        "llama3",
        "qwen",
        "gemma",
    ):  # which lose nothing
        assert tokenizer.decode(ids) == "".join(PROMPT)


def test_pieces_are_those_of_running_text_wherever_it_has_a_border(family: tuple[str, PreTrainedTokenizerFast]) -> None:
    name, tokenizer = family
    pieces, draw, compared = Pieces(tokenizer), random.Random(0), 0
    for _ in range(400):
        texts = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 5))) for _ in range(3)]
        texts = [t if t.strip() else f"{t}a" for t in texts]
        texts = [texts[0].rstrip() or "a", *pieces.connected(texts[1:])]
        whole, inside = running(tokenizer, "".join(texts))
        borders = {len(texts[0]), len(texts[0] + texts[1])}
        glued = any((a[-1] + b[0]).isalnum() for a, b in itertools.pairwise(texts))
        if name == "bert" and glued:  # inside of a word it writes ##, in running text alone
            continue
        if not borders & inside:
            compared += 1
            assert joined(pieces, texts) == whole, (name, texts)
    assert compared > 100, compared


def test_counts_are_those_of_the_pieces(family: tuple[str, PreTrainedTokenizerFast]) -> None:
    pieces = Pieces(family[1])
    texts = ["", *PROMPT, "\n", " ", "我 <|end|> </s>", "\n\nso"]
    assert pieces.count(texts).tolist() == [len(pieces.following(text)) for text in texts]
    assert pieces.count([]).tolist() == []


def test_only_marking_tokenizers_have_other_tokens_than_before(family: tuple[str, PreTrainedTokenizerFast]) -> None:
    name, tokenizer = family
    now, apart = Pieces(tokenizer), Pieces(tokenizer, "apart")
    same = [now.following(text) == encode(tokenizer, text) for text in PROMPT[1:]]
    assert all(same) == (name not in MARKED)
    assert all(apart.following(text) == encode(tokenizer, text) == apart.first(text) for text in PROMPT)
    assert apart.connected(PROMPT) == PROMPT


@pytest.mark.parametrize("task", ["meld", "mosei", "simsv2", "cherma"])
def test_a_batch_joins_pieces_and_the_tree_joins_answers_alike(
    family: tuple[str, PreTrainedTokenizerFast], task: str
) -> None:
    name, tokenizer = family
    question, config = BUILT_IN[task], DataConfig(history=2)
    tree = task_tree(question, tokenizer, "words", question.language)
    collate = Collator(question, tokenizer, config, widths={}, rates={}, pseudo_tokens=0, modalities=("text",))
    history = (("Ross", "I know that."), ("", "so\nso"))
    sample = Sample(id="a", text="see there", target=1.0, history=history)  # type: ignore[arg-type]
    before, after = prompt_texts(question, config)
    text = f"{before}Ross: I know that.\nso\nso\nsee there{after}"
    batch = collate([sample])
    length = int(batch.context_length_B[0])
    borders = {len(before), len(before) + 19, len(text) - len(after) - 9, len(text) - len(after)}
    whole, inside = running(tokenizer, text)
    if not borders & inside:
        assert batch.input_ids_BL[0, :length].tolist() == whole
    else:
        assert tokenizer.decode(batch.input_ids_BL[0, :length]) == tokenizer.decode(whole)
    assert collate.sizes([sample]).tokens_N[0] + len(collate.prefix) == batch.input_ids_BL.shape[1]
    assert [list(tokens) for tokens in tree.tokens] == collate.answers, name


def test_no_answer_begins_with_two_spaces() -> None:
    tokenizer = FAMILIES["llama2"]()
    for text in (" joy", " -0.3"):
        tokens = tokenizer.convert_ids_to_tokens(Pieces(tokenizer).following(text))
        assert "".join(tokens) == text.replace(" ", "▁")
    assert "".join(tokenizer.convert_ids_to_tokens(Pieces(tokenizer).following("高兴"))) == "高兴"


def test_added_tokens_in_a_text_are_cut_without_new_marks() -> None:
    tokenizer = FAMILIES["llama2"]()
    tokenizer.add_tokens(["<think>"])
    pieces = Pieces(tokenizer)
    ids = pieces.following("so <think> so")
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "so▁<think>▁so"
    assert "".join(tokenizer.convert_ids_to_tokens(pieces.first("so <think> so"))) == "▁so▁<think>▁so"
    assert pieces.count(["so <think> so"]).tolist() == [len(ids)]


def test_a_tokenizer_without_offsets_will_do(tmp_path: Path) -> None:
    tokenizer = in_python(tmp_path)
    assert not tokenizer.is_fast
    pieces = Pieces(tokenizer)
    texts = ["Emotion <Multimodal>", *pieces.connected(["so there", " joy"])]
    assert pieces.count(texts).tolist() == [len(pieces.following(text)) for text in texts]
    assert tokenizer.decode(joined(pieces, texts)).split()[-1] == "joy"


def test_labels_that_a_normalizer_makes_equal_are_named() -> None:
    tokenizer = FAMILIES["stripping"]()
    with pytest.raises(AnswerError, match="' Joy' and ' joy' have the same tokens"):
        build_tree([" Joy", " joy", " anger"], Pieces(tokenizer).following, end_token(tokenizer))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=FAMILIES["llama3"]().backend_tokenizer)
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        task_tree(BUILT_IN["meld"], tokenizer, "words", "en")
