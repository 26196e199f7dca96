"""Text to tokens, the same way for prompts, samples and answers: no token is added, and special tokens written in a text are not parsed.

A prompt is tokenised in pieces, since pseudo tokens stand between them and answers are scored as a tree. Many tokenizers mark
the beginning of a text (Llama 2 and Mistral put ``▁`` before it, RoBERTa's a space) or strip its ends: a piece inside of a
prompt that is tokenised alone would get a second space mark, or lose its own. :class:`Pieces` tokenises it as it stands in
running text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

Joining = Literal["running", "apart"]
"""How pieces of a prompt are tokenised: as in running text, or each as if it were a text of its own, as earlier versions did."""

ANCHORS = ("\n", ">", ":", "：", ".", ")", "=", "0", "a", "字")
"""What a piece is tokenised behind, in the order in which they are tried: a newline joins with least of what follows it."""

PROBES = ("joy", " joy", "Joy", "7", "-0.3", " 0.1", "</>", "高兴", " 高兴")


class Pieces:
    """Tokenises the pieces of a prompt so that, joined, they are the tokens of the whole text.

    Let t(x) be the tokens of a text x alone, and a + x the text x behind an anchor a (:data:`ANCHORS`). A piece x that follows
    another has the tokens that t(a + x) has behind t(a), for the first anchor with t(a + x) = t(a) …: there a token ends where
    the anchor does. Then t(x_1 + x_2 + …) is the pieces' tokens joined, wherever it has a border of tokens at every border of
    pieces: no merge of a BPE and no piece of a unigram model crosses these borders, so each side has the tokens that it has
    beside any other neighbour. Where running text has no border of tokens there ("：-" may be one token), the pieces
    have the tokens that they have behind the anchor; where no anchor leaves a border, those that they have alone.

    For a tokenizer that neither marks nor strips the ends of texts (byte-level BPE without a prefix, Gemma, BERT) that is t(x),
    and t(x) is taken. Which it is, is seen by :data:`PROBES`. Nothing is asked of the tokenizer but tokens: one without offsets will do.

    Args:
        joining: "apart" takes t(x) always.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, joining: Joining = "running") -> None:
        self.tokenizer, self.joining = tokenizer, joining
        self.marked = joining == "running" and any(self._behind(x) != _plain(tokenizer, x) for x in PROBES)

    def first(self, text: str) -> list[int]:
        """The tokens of a piece at the beginning of a text."""
        if not self.marked:
            return encode(self.tokenizer, text)
        begin, *rest = _cut(self.tokenizer, text, _plain(self.tokenizer, text))
        return _plain(self.tokenizer, begin) + [index for piece in rest for index in self._behind(piece)]

    def following(self, text: str) -> list[int]:
        """The tokens of a piece that stands behind another."""
        if not self.marked:
            return encode(self.tokenizer, text)
        row = self._behind(text)
        pieces = _cut(self.tokenizer, text, row)
        return row if len(pieces) == 1 else [index for piece in pieces for index in self._behind(piece)]

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """The number of tokens of each text, `[N]`, as :meth:`following` makes them; many at once."""
        if not self.marked or not self._anchors or not texts:
            return count_tokens(self.tokenizer, texts)
        anchor, ids = self._anchors[0]
        rows = _many(self.tokenizer, [anchor + text for text in texts])
        added = _added(self.tokenizer).keys()
        plain = [row[: len(ids)] == ids and added.isdisjoint(row) for row in rows]
        return np.array(
            [
                len(row) - len(ids) if simple and text else len(self.following(text))
                for text, row, simple in zip(texts, rows, plain, strict=True)
            ],
            dtype=np.int64,
        )

    @cached_property
    def drops_ends(self) -> bool:
        """Whether white space at the end of a piece leaves no token: it has to stand before the next piece."""
        return self.joining == "running" and self.following("joy\n") == self.following("joy")

    def connected(self, texts: Sequence[str]) -> list[str]:
        """Pieces that follow one another, with the white space at their borders where the tokenizer sees it."""
        if not self.drops_ends:
            return list(texts)
        out, space = [], ""
        for text in texts:
            kept = text.rstrip()
            out.append(space + kept if kept else kept)
            space = text[len(kept) :] if kept else space + text
        return out

    def _behind(self, text: str) -> list[int]:
        """The tokens of `text` behind the first anchor that leaves a border, added tokens parsed."""
        for anchor, ids in self._anchors if text else ():
            row = _plain(self.tokenizer, anchor + text)
            if row[: len(ids)] == ids:
                return row[len(ids) :]
        return _plain(self.tokenizer, text)

    @cached_property
    def _anchors(self) -> list[tuple[str, list[int]]]:
        """The anchors that the tokenizer knows and does not take for white space, with their tokens."""
        found = []
        for anchor in ANCHORS:
            ids = _plain(self.tokenizer, anchor)
            alone = [_plain(self.tokenizer, text) for text in ("x", " x")]
            if ids and self.tokenizer.unk_token_id not in ids and _plain(self.tokenizer, f"{anchor}x") not in alone:
                found.append((anchor, ids))
        return found


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone: no special token is added, and none written in `text` is parsed.

    ``<|endoftext|>`` in a user's text becomes the tokens of these thirteen characters. The same holds for added tokens
    that are not marked special, such as Qwen's ``<think>``: the text is cut behind their first character.
    """
    ids = _plain(tokenizer, text)
    pieces = _cut(tokenizer, text, ids)
    return ids if len(pieces) == 1 else [index for piece in pieces for index in _plain(tokenizer, piece)]


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """The number of tokens of each text as :func:`encode` makes them; many at once."""
    if not texts:
        return np.zeros(0, dtype=np.int64)
    rows = _many(tokenizer, texts)
    added = _added(tokenizer).keys()
    return np.array(
        [
            len(row) if added.isdisjoint(row) else len(encode(tokenizer, text))
            for text, row in zip(texts, rows, strict=True)
        ],
        dtype=np.int64,
    )


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model expects before any text, as its own tokenizer writes it: nothing (Qwen), a begin-of-sequence token
    (Llama), or several (GLM's ``[gMASK]<sop>``)."""
    ids = list(tokenizer("", add_special_tokens=True)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids.pop()
    return ids


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the tokenizer's own end-of-sequence token.

    Chat models that name several end tokens in their generation config are ended by this one alone, in training, scoring
    and generation.

    Raises:
        ValueError: the tokenizer has none.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'the backbone'} names no end-of-sequence token (eos_token): "
            "answers could not end. Set eos_token in its tokenizer_config.json"
        )
    return int(end)


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens that are not marked special and would be parsed as special ones."""
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if not token.special and len(token.content) > 1 and token.content.strip(" \t\r\n▁")
    }


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[str]:
    """`text`, whose tokens are `ids`, in parts in which no added token is parsed: behind the first character of each."""
    added = _added(tokenizer)
    if added.keys().isdisjoint(ids):
        return [text]
    marks = "|".join(re.escape(content) for content in sorted(added.values(), key=len, reverse=True))
    cuts = [match.start() + 1 for match in re.finditer(f"(?={marks})", text)]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _many(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) if text else []
