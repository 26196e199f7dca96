"""Data of the published benchmarks' shapes, generated: lengths are as published, contents are noise. No dataset is needed.

Where each number comes from:

- MELD: tokens per utterance are counted on the 9,989 published training utterances with a byte-level BPE of 8,192
  entries trained on them (mean 11.1); `MELD_TOKENS` is that histogram. Utterances last 3.59 s on average (Poria et
  al. 2019). The published feature files hold 157 x 64 audio and 32 x 64 video frames, padded; taken here: 15.7 and
  3.2 frames a second, so that the files' ends are at 10 s. The instruction is as long as a published predecessor's
  (72 tokens).
- MOSEI: 19 words and 7.28 s a clip (Zadeh et al. 2018); `unaligned_50.pkl` holds 500 x 74 audio and 375 x 35 video
  frames, 20 and 15 a second, so that its ends are at 25 s; at most 50 tokens of text. A word counts as one token.
- SIMS v2: `ch-simsv2s.pkl` holds 925 x 25 audio and 232 x 177 video frames, taken here as 100 and 25 a second, and at
  most 50 tokens. Clips of 3.67 s with 15 tokens on average are those of its predecessor, CH-SIMS (Yu et al. 2020).

Durations are log-normal with sigma 0.5 and these means, cut at the ends of the files; so are lengths of text that no
histogram gives. Text and duration of a clip rise together (correlation 0.8 of their logarithms).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.batch import Sample
from trainer.config import DataConfig, TinyConfig
from trainer.data.collate import prompt_texts
from trainer.models.backbone.tiny import build_tiny
from trainer.tasks import Task, get_task

# fmt: off
MELD_TOKENS = (  # how many utterances have 1, 2, 3, ... tokens
    40, 1053, 510, 635, 575, 675, 556, 584, 521, 489, 454, 384, 358, 333, 270, 290, 263, 239, 211, 205, 185, 148, 122, 133, 110, 116, 102, 92,
    65, 49, 48, 27, 23, 23, 12, 22, 15, 7, 6, 2, 3, 9, 2, 1, 4, 3, 2, 0, 4, 1, 2, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1,
)  # the last counts one of 90 tokens, which a file of 65 cuts off
# fmt: on
SPREAD, TOGETHER = 0.5, 0.8
MELD_INSTRUCTION = (
    "Recognise the emotion of the speaker in this utterance from its words, voice and face. Take the whole clip into "
    "account, also where its parts disagree: words can be meant as a joke, a voice can hide what a face shows, and a short "
    "utterance can say little by itself. Answer with one of: {answers}."
)
WORDS, CHARACTERS = 1500, 1500


@dataclass(frozen=True)
class Shape:
    """One benchmark: the task, frames a second, features a frame, and the fixed lengths of its published files."""

    name: str
    seconds: float  # mean duration
    tokens: float | tuple[int, ...]  # mean tokens of a text, or the histogram
    text_end: int
    audio_end: int
    video_end: int
    widths: tuple[int, int]
    rates: tuple[float, float]
    instruction: str | None = None  # in place of the task's own

    @property
    def task(self) -> Task:
        task = get_task(self.name)
        if self.instruction is None:
            return task
        prompt = task.prompts[task.language].model_copy(update={"instruction": self.instruction})
        return task.model_copy(update={"prompts": {**task.prompts, task.language: prompt}})

    @property
    def streams(self) -> dict[str, tuple[int, float, int]]:
        """Modality -> features a frame, frames a second, frames of the published array."""
        ends = (self.audio_end, self.video_end)
        return dict(zip(("audio", "video"), zip(self.widths, self.rates, ends, strict=True), strict=True))


SHAPES = {
    "meld": Shape("meld", 3.59, MELD_TOKENS, 65, 157, 32, (64, 64), (15.7, 3.2), MELD_INSTRUCTION),
    "mosei": Shape("mosei", 7.28, 19.0, 50, 500, 375, (74, 35), (20.0, 15.0)),
    "simsv2": Shape("simsv2", 3.67, 15.0, 50, 925, 232, (25, 177), (100.0, 25.0)),
}


def make_samples(shape: Shape, n: int, seed: int = 0) -> list[Sample]:
    """`n` samples, the same for the same seed; every length is at least 1 and at most the published file's."""
    rng = np.random.default_rng([seed, n])
    task = shape.task
    deviate = rng.standard_normal((2, n))
    deviate[1] = TOGETHER * deviate[0] + math.sqrt(1.0 - TOGETHER**2) * deviate[1]
    counts = _text_lengths(shape, deviate[0])
    seconds = shape.seconds * np.exp(SPREAD * deviate[1] - SPREAD**2 / 2)
    pieces = text_pieces(task)
    samples = []
    for i in range(n):
        text = "".join(pieces[int(k)] for k in rng.integers(len(pieces), size=counts[i]))
        if task.grid is None:
            target = float(rng.integers(len(task.labels)))
        else:
            target = task.grid.values[int(rng.integers(len(task.grid.values)))]
        arrays = {}
        for name, (width, rate, end) in shape.streams.items():
            frames = int(np.clip(round(seconds[i] * rate), 1, end))
            arrays[f"{name}_TF"] = rng.standard_normal((frames, width), dtype=np.float32)
        samples.append(Sample(id=f"{shape.name}-{i:05d}", text=text, target=target, **arrays))
    return samples


def _text_lengths(shape: Shape, deviate: np.ndarray) -> np.ndarray:
    """Tokens per text for standard normal deviates: the histogram's quantiles, or log-normal."""
    if isinstance(shape.tokens, tuple):
        share = np.cumsum(shape.tokens) / sum(shape.tokens)
        rank = (np.argsort(np.argsort(deviate)) + 0.5) / len(deviate)
        return np.searchsorted(share, rank) + 1
    drawn = shape.tokens * np.exp(SPREAD * deviate - SPREAD**2 / 2)
    return np.clip(np.round(drawn), 1, shape.text_end).astype(int)


def text_pieces(task: Task) -> list[str]:
    """What texts are put together from; each is one token of :func:`make_backbone`'s tokenizer."""
    if task.language == "zh":
        return [chr(0x4E00 + 7 * i) for i in range(CHARACTERS)]
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    return [f" {a}{b}" for a, b in itertools.islice(itertools.product(syllables, syllables), WORDS)]


def make_backbone(folder: Path, vocabulary: int) -> Path:
    """A random Qwen3 of `vocabulary` entries in `folder`: width 256, 4 layers, 4 heads (2 of keys), intermediate 768.

    English words, of texts and prompts alike, are one token each; Chinese texts have a token per character, prompts
    about one for two. Embedding and head are two matrices.
    """
    texts: list[str] = []
    for shape in SHAPES.values():
        task = shape.task
        prompts = [*prompt_texts(task, DataConfig()), *task.answer_texts()]
        if (
            task.language == "zh"
        ):  # a run of Chinese is one word to the tokenizer: cut, or it would learn whole sentences
            prompts = [text[i : i + 2] for text in prompts for i in range(0, len(text), 2)]
        texts += [*text_pieces(task), *prompts]
    config = TinyConfig(
        hidden_size=256, intermediate_size=768, layers=4, heads=4, kv_heads=2, head_dim=64, vocab_size=vocabulary
    )
    build_tiny(config, texts, folder)
    return folder
