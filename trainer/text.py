"""Text to tokens, the same way for prompts, samples and answers: no token is added, and special tokens written in a text are not parsed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone: no special token is added, and none written in `text` is parsed.

    ``<|endoftext|>`` in a user's text becomes the tokens of these thirteen characters. The same holds for added tokens
    that are not marked special, such as Qwen's ``<think>``: the text is cut behind their first character.
    """
    ids = _plain(tokenizer, text)
    added = _added(tokenizer)
    if added.keys().isdisjoint(ids):
        return ids
    marks = "|".join(re.escape(content) for content in sorted(added.values(), key=len, reverse=True))
    cuts = [match.start() + 1 for match in re.finditer(f"(?={marks})", text)]
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [index for piece in pieces for index in _plain(tokenizer, piece)]


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """The number of tokens of each text as :func:`encode` makes them; many at once."""
    if not texts:
        return np.zeros(0, dtype=np.int64)
    rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
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


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) if text else []
