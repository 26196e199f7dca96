"""Alignment of two listings of the same utterances that share no ids, such as MELD's features and annotations.

Both are ordered, so rows are paired by the best common subsequence on (normalised text, label). Many utterances ("Okay." neutral)
occur often, so the pairing is accepted only where it is the single best one: with P(i, j) the best score of the first i and j rows
and S(i, j) that of the rest, a pair is part of some best alignment iff P(i, j) + s(i, j) + S(i+1, j+1) is the best score of all, and
the best alignment is unique iff those pairs are as many as one alignment has. A pair counts most, and among alignments
with as many pairs literally equal texts count above texts equal after normalisation, and these above cut ones.

At least 98 % must align, so pairs lie within a band of 2 % around the diagonal: 0.2 s for 10,000 rows.
"""

from __future__ import annotations

import contextlib
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Key = tuple[str, str]  # text, label
MINIMUM = 0.98

_PAIR = 1 << 20  # of a pair; a literally equal text adds 2, an equal one 1, a cut one nothing
_NEVER = -(1 << 60)
_SAFE_CUT = 16  # letters: so long a text that another begins with is that text cut off


class AlignmentError(ValueError):
    """Two listings that cannot be aligned; the message names the first mismatch."""


@dataclass
class Alignment:
    """`pairs` of row numbers in order, left and right; None stands for the row that the other side lacks."""

    pairs: list[tuple[int | None, int | None]]

    @property
    def left_only(self) -> list[int]:
        return [i for i, j in self.pairs if j is None and i is not None]

    @property
    def right_only(self) -> list[int]:
        return [j for i, j in self.pairs if i is None and j is not None]


def normalise(text: str) -> str:
    """Letters and digits only, lower case, without accents: what re-encoding, tokenising and quoting leave of a text.

    UTF-8 that was read as Windows-1252 (``â€™``) is read anew. A text of other signs only keeps them.
    """
    with contextlib.suppress(UnicodeError):
        text = text.encode("cp1252").decode("utf-8")
    text = unicodedata.normalize("NFKD", text).casefold()
    return "".join(filter(str.isalnum, text)) or "".join(text.split())


def align(left: Sequence[Key], right: Sequence[Key]) -> Alignment:
    """The only best in-order pairing of `left` and `right`; texts on the right may be cut off.

    Raises:
        AlignmentError: fewer than 98 % of the longer side's rows pair, or several best pairings exist.
    """
    longest = max(len(left), len(right))
    slack = math.floor(longest * (1 - MINIMUM) + 1e-9)
    scores = _Scores(left, right, slack)
    mismatch = scores.first_mismatch()
    if mismatch == len(left) == len(right):
        return Alignment([(i, i) for i in range(longest)])
    count, pairs = scores.best_pairs() if abs(len(left) - len(right)) <= slack else (0, [])
    if longest - count > slack:
        raise AlignmentError(
            f"only {count:,} of {longest:,} rows align in order ({MINIMUM:.0%} are needed); first mismatch: "
            + _mismatch(left, right, mismatch)
        )
    if len(pairs) > count:
        raise AlignmentError(_ambiguity(left, right, pairs))
    return Alignment(list(_merge(pairs, len(left), len(right))))


class _Scores:
    """s(i, j) in the band |i - j| <= slack, one row of `2 slack + 1` at a time, and the two passes over them."""

    def __init__(self, left: Sequence[Key], right: Sequence[Key], slack: int) -> None:
        self.n, self.m, self.slack, self.width = len(left), len(right), slack, 2 * slack + 1
        labels = [[label.strip().casefold() for _, label in side] for side in (left, right)]
        plain = [[text.strip() for text, _ in side] for side in (left, right)]
        bare = [[normalise(text) for text, _ in side] for side in (left, right)]
        self.literal = self._codes(plain, labels)
        self.equal = self._codes(bare, labels)
        self.cut = self._cuts([text for text, _ in right], bare, labels)

    def _codes(self, texts: list[list[str]], labels: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """One number for each different (text, label); the right side padded by the band."""
        seen: dict[tuple[str, str], int] = {}
        codes = [
            np.array([seen.setdefault(key, len(seen)) for key in zip(*side, strict=True)], dtype=np.int64)
            for side in zip(texts, labels, strict=True)
        ]
        tail = max(self.n - self.m, 0) + self.slack + 1
        return codes[0], np.pad(codes[1], (self.slack, tail), constant_values=-1)

    def _cuts(self, right: list[str], bare: list[list[str]], labels: list[list[str]]) -> dict[int, list[int]]:
        """Left row -> right rows of the band whose text is the beginning of its own, cut off.

        A text counts as cut if it is long, or as long as any of its file in letters or in words.
        """
        cuts: dict[int, list[int]] = {}
        letters = max(map(len, right), default=0) - 2
        words = max((len(text.split()) for text in right), default=0)
        for j, text in enumerate(bare[1]):
            full = len(right[j]) >= letters or len(right[j].split()) >= words
            if not text or not (full or len(text) >= _SAFE_CUT):
                continue
            for i in range(max(0, j - self.slack), min(self.n, j + self.slack + 1)):
                if bare[0][i].startswith(text) and labels[0][i] == labels[1][j]:
                    cuts.setdefault(i, []).append(j)
        return cuts

    def row(self, i: int) -> np.ndarray:
        """s(i, j) for j from i - slack to i + slack; 0 where the rows do not fit."""
        band = slice(i, i + self.width)
        equal = self.equal[1][band] == self.equal[0][i]
        out = np.where(equal, _PAIR + 1, 0) + (equal & (self.literal[1][band] == self.literal[0][i]))
        for j in self.cut.get(i, ()):
            out[j - i + self.slack] = max(out[j - i + self.slack], _PAIR)
        return np.asarray(out)

    def outside(self, i: int) -> np.ndarray:
        """Which places of the band of row i lie outside 0 <= j <= m."""
        j = np.arange(i - self.slack, i + self.slack + 1)
        return (j < 0) | (j > self.m)

    def best_pairs(self) -> tuple[int, list[tuple[int, int]]]:
        """The number of pairs of a best alignment, and all pairs that are part of any."""
        before = np.full((self.n + 1, self.width + 1), _NEVER, dtype=np.int64)  # P; the last place stays _NEVER
        before[0, :-1] = np.where(self.outside(0), _NEVER, 0)
        for i in range(self.n):
            step = np.maximum(before[i, 1:], _paired(before[i, :-1], self.row(i)))
            best = np.maximum.accumulate(step)
            best[self.outside(i + 1)] = _NEVER
            before[i + 1, :-1] = best
        total = int(before[self.n, self.m - self.n + self.slack])
        after = np.where(self.outside(self.n), _NEVER, 0)  # S of the row below
        pairs = []
        for i in range(self.n - 1, -1, -1):
            taken = _paired(after, self.row(i))
            hits = np.flatnonzero(before[i, :-1] + taken == total)
            pairs += [(i, i - self.slack + int(at)) for at in hits[::-1]]
            step = np.maximum(np.concatenate([[_NEVER], after[:-1]]), taken)
            after = np.maximum.accumulate(step[::-1])[::-1]
            after[self.outside(i)] = _NEVER
        return total // _PAIR, pairs[::-1]

    def first_mismatch(self) -> int:
        """The first row that does not fit the row of the same number."""
        both = min(self.n, self.m)
        for i in range(both):
            if not self.row(i)[self.slack]:
                return i
        return both


def _paired(rest: np.ndarray, score: np.ndarray) -> np.ndarray:
    return np.where(score > 0, rest + score, _NEVER)


def _merge(pairs: list[tuple[int, int]], n: int, m: int) -> Iterator[tuple[int | None, int | None]]:
    i = j = 0
    for left, right in [*pairs, (n, m)]:
        yield from ((k, None) for k in range(i, left))
        yield from ((None, k) for k in range(j, right))
        if left < n:
            yield left, right
        i, j = left + 1, right + 1


def _mismatch(left: Sequence[Key], right: Sequence[Key], at: int) -> str:
    return f"row {at}, {_shown(left, at)} against {_shown(right, at)}"


def _ambiguity(left: Sequence[Key], right: Sequence[Key], pairs: list[tuple[int, int]]) -> str:
    for side, rows, others in ((0, left, right), (1, right, left)):
        fits: dict[int, list[int]] = {}
        for pair in pairs:
            fits.setdefault(pair[side], []).append(pair[1 - side])
        first = next((at for at, found in sorted(fits.items()) if len(found) > 1), None)
        if first is not None:
            names = ("annotation", "feature")[side], ("annotation", "feature")[1 - side]
            found = ", ".join(f"{at} {_shown(others, at)}" for at in fits[first][:3])
            return (
                f"an ambiguous run: {names[0]} row {first} {_shown(rows, first)} fits {names[1]} rows {found} equally "
                "well, because rows near it are missing on one side"
            )
    raise AssertionError("as many pairs as one alignment has")


def _shown(rows: Sequence[Key], at: int) -> str:
    if at >= len(rows):
        return "no row"
    text, label = rows[at]
    return f"{text if len(text) <= 60 else text[:60] + '…'!r} [{label}]"
