"""Sets of labels as numbers and as text, for tasks whose samples have any number of labels.

A set is one float64, the sum of ``2**i`` over the indices i of its labels, so that truths and predictions of every kind of task
are one number a sample. In text a set is its labels in the task's order with commas between them, or `NONE` where it is empty.

Legend: N samples, C labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

MOST_LABELS = 52  # whose sets float64 holds exactly
NONE = "none"
SEPARATORS = re.compile(r"[,;|，；、]")


def encode_set(indices: Iterable[int]) -> float:
    """The number of the set of these indices."""
    return float(sum(1 << i for i in set(indices)))


def decode_sets(value_N: np.ndarray, labels: int) -> np.ndarray:
    """`[N, C]`, bool: which labels each number's set has; a nan has none."""
    bits_N = np.where(np.isfinite(value_N), value_N, 0).astype(np.int64)
    return np.asarray((bits_N[:, None] >> np.arange(labels)) & 1, dtype=bool)


def encode_sets(member_NC: np.ndarray) -> np.ndarray:
    """`[N]`, float64: the numbers of sets given as in :func:`decode_sets`."""
    return member_NC.astype(np.float64) @ 2.0 ** np.arange(member_NC.shape[1])


def set_text(labels: Sequence[str], value: float) -> str:
    """The set as text."""
    return ", ".join(label for i, label in enumerate(labels) if int(value) >> i & 1) or NONE


def split_set(text: str) -> list[str]:
    """The words of a set that is written with a comma, semicolon, bar or the like between them; none of an empty one."""
    words = [word.strip() for word in SEPARATORS.split(text)]
    return [] if words == [NONE] else [word for word in words if word]


def parse_set(labels: Sequence[str], text: str) -> float | None:
    """The number of a set written as :func:`set_text` does, or with another separator; None where a word is no label."""
    index = {label: i for i, label in enumerate(labels)}
    words = split_set(text)
    if not text.strip() or any(word not in index for word in words):
        return None
    return encode_set(index[word] for word in words)
