"""What the baselines read of a sample: TF-IDF of its text, statistics over the valid frames of its audio and video.

Shapes: N samples, T frames, F features of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

from trainer.data.dataset import SplitView
from trainer.tasks import Language

Ngrams = Literal["words", "characters", "both"]
STATISTICS = ("mean", "sd", "max")
_WORD = r"(?u)\w+|[^\w\s]"  # a word, or one punctuation mark: "?" and "!" say much about emotions
_WORDS = (1, 2)
_CHARACTERS = (1, 3)
_RARE = 2  # n-grams of fewer training texts are left out


def default_ngrams(language: Language) -> Ngrams:
    """Characters for Chinese, which does not separate its words; words otherwise."""
    return "characters" if language == "zh" else "words"


class TextFeatures:
    """TF-IDF with sublinear term frequencies, of word n-grams (1, 2), character n-grams (1 to 3), or both side by side.

    Each kind's rows have norm 1; a text without a known n-gram has a row of zeros. Lower case; n-grams of a single
    training text are left out.
    """

    def __init__(self, ngrams: Ngrams) -> None:
        words = TfidfVectorizer(token_pattern=_WORD, ngram_range=_WORDS, min_df=_RARE, sublinear_tf=True)
        characters = TfidfVectorizer(analyzer="char", ngram_range=_CHARACTERS, min_df=_RARE, sublinear_tf=True)
        self.vectorizers = {"words": [words], "characters": [characters], "both": [words, characters]}[ngrams]

    def fit(self, texts: Iterable[str]) -> TextFeatures:
        """Count the n-grams of the training texts.

        Raises:
            ValueError: no n-gram stands in two texts.
        """
        listed = list(texts)
        for vectorizer in self.vectorizers:
            vectorizer.fit(listed)
        return self

    def transform(self, texts: Iterable[str]) -> sparse.csr_matrix:
        listed = list(texts)
        return sparse.csr_matrix(sparse.hstack([v.transform(listed) for v in self.vectorizers]))


def statistics(view: SplitView, modality: str) -> np.ndarray:
    """[N, 3F]: mean, standard deviation and maximum of each feature over the valid frames, in float64; nan where missing."""
    width = view.widths[modality]
    out = np.full((len(view), len(STATISTICS) * width), np.nan)
    for i in range(len(view)):
        values_TF, mask_T = view.stream(modality, i)
        if values_TF is None:
            continue
        valid_TF = values_TF if mask_T is None else values_TF[mask_T]
        if len(valid_TF):
            frames = valid_TF.astype(np.float64)
            out[i] = np.concatenate([frames.mean(axis=0), frames.std(axis=0), frames.max(axis=0)])
    return out


class StreamFeatures:
    """:func:`statistics`, standardised on the training samples that have the stream, and whether a sample lacks it.

    A sample without the stream has the training mean, 0. Where a baseline joins it with other features, columns are
    divided by the root of their number, so that a row has a mean squared norm of 1, as one of TF-IDF has.
    """

    def __init__(self, *, joined: bool) -> None:
        self.scaler, self.joined = StandardScaler(), joined

    def fit(self, statistics_NF: np.ndarray) -> StreamFeatures:
        self.scaler.fit(self._with_absence(statistics_NF))
        return self

    def transform(self, statistics_NF: np.ndarray) -> np.ndarray:
        scaled_NF = np.nan_to_num(self.scaler.transform(self._with_absence(statistics_NF)), nan=0.0)
        return np.asarray(scaled_NF / np.sqrt(scaled_NF.shape[1]) if self.joined else scaled_NF)

    @staticmethod
    def _with_absence(statistics_NF: np.ndarray) -> np.ndarray:
        return np.column_stack([statistics_NF, np.isnan(statistics_NF).all(axis=1)])
