"""The core of every prediction: samples that were checked in, answers out, in the batches of an evaluation of these samples.

`egmf predict` and :class:`trainer.Predictor` answer through it.

Legend: K pseudo tokens, H hidden size of the backbone, L tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.answers.prediction_table import SampleAnswer
from trainer.batch import Sample
from trainer.models.layouts import PaddedLayout
from trainer.run.evaluate import Scorer
from trainer.run.lengths import Use, measure
from trainer.run.model_parts import OpenedModel

CHUNK_SAMPLES = 512  # that are sorted by length together
CHUNK_BYTES = 256 << 20  # of features in a chunk

GateWeights = tuple[dict[str, float | None], dict[str, dict[str, float | None]]]


class Asked(Protocol):
    """A sample, and the tasks that it is asked; None where it cannot be answered."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def sample(self) -> Sample | None: ...


AnyAsked = TypeVar("AnyAsked", bound=Asked)


@dataclass(frozen=True)
class Length:
    """Of one sample: tokens of its text before it is cut (0: none), the positions that it needs with its longest answer, and those that
    it adds to the batches that answer it."""

    text: int
    positions: int
    cost: int


class Answering:
    """Answers samples with an opened model. What is computed once for a task, the keys and values of its prefix, is kept as long as this.

    Several threads may use one on a single process; batches then pass the model one at a time. With several processes every rank makes
    one, and calls :meth:`answers` equally often with the same samples.
    """

    def __init__(self, run: OpenedModel) -> None:
        self.run = run
        self._scorers = {name: Scorer(run.forward, run.parts, run.config, name, run.world) for name in run.parts.tasks}
        self._model = threading.Lock()
        plain = not run.parts.model.backbone.tokenizer.is_fast  # one in Python may not be shared by threads
        self._tokenizer = threading.RLock() if plain else contextlib.nullcontext()

    def lengths(self, asked: Sequence[Asked]) -> list[Length | None]:
        """How long every sample is that can be answered."""
        parts, config = self.run.parts, self.run.config
        use: Use = "generated" if config.eval.mode == "generate" else "scored"
        found: list[Length | None] = [None] * len(asked)
        for name, scorer in self._scorers.items():
            places, samples = _of_task(asked, name)
            if not samples:
                continue
            with self._tokenizer:
                measured = measure(parts.collators[name], parts.tries[name], "input", samples, use, parts.limit)
                sizes = scorer.sizes(samples)
            own = zip(places, measured.text_N.tolist(), measured.positions_N.tolist(), sizes.tokens_N, strict=True)
            for i, text, positions, tokens in own:
                before = found[i] or Length(0, 0, 0)
                cost = before.cost + sizes.prefix + int(tokens)
                found[i] = Length(max(text, before.text), max(positions, before.positions), cost)
        return found

    def too_long(self, length: Length | None) -> str | None:
        """The fault of a sample that is longer than the model can read; None where it is not."""
        limit, name = self.run.parts.limit, self.run.config.model.backbone.name
        if length is None or limit is None or not limit.hard or length.positions <= limit.positions:
            return None
        return f"too long for {name} ({limit.reason}): {length.positions} positions with the longest answer"

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked], *, pseudo_tokens: bool = False) -> list[tuple[int, str, SampleAnswer]]:
        """Place, task and answer of every sample that can be answered and of every question about it, in order, on rank 0. Batches are
        those of an evaluation of these samples; with `pseudo_tokens` the answers have these embeddings [K, H]."""
        mine: list[tuple[int, int, SampleAnswer]] = []
        for number, (name, scorer) in enumerate(self._scorers.items()):
            places, samples = _of_task(asked, name)
            lengths = np.array([_length(sample) for sample in samples], dtype=np.int64)
            with self._tokenizer:
                batches = list(scorer.batches(samples, lengths))
            for micro in batches:
                with self._model, self._tokenizer:
                    answers = scorer.answer([samples[i] for i in micro.indices], micro, pseudo_tokens=pseudo_tokens)
                if micro.weight:
                    mine += [(places[i], number, answer) for i, answer in zip(micro.indices, answers, strict=True)]
            scorer.collate.forget_texts()
        everyone = self.run.world.gather(mine) or []
        names = list(self._scorers)
        found = sorted(itertools.chain(*everyone), key=lambda one: one[:2])
        return [(i, names[number], answer) for i, number, answer in found]

    @torch.no_grad()
    def prompt(self, task: str, sample: Sample) -> tuple[Tensor, Tensor]:
        """Input embeddings [L, H] of a sample's prompt, with the pseudo tokens at their places, and its tokens [L]."""
        collate, model = self.run.parts.collators[task], self.run.parts.model
        with self._model, self._tokenizer:
            layout = PaddedLayout(collate([sample], answers=False).to(self.run.world.device))
            embeds_1LH, _ = model.embed(layout)
            collate.forget_texts()
        return embeds_1LH[0].cpu(), layout.token_ids[0].cpu()

    def probabilities(self, task: str, answer: SampleAnswer) -> dict[str, float] | None:
        """The probability of each of the task's answers, or of its labels; None for generated and invalid ones."""
        if answer.probabilities is None:
            return None
        known = self.run.parts.tasks[task]
        words = known.labels if known.kind == "multilabel" else known.answers()
        return dict(zip(words, answer.probabilities, strict=True))

    def gates(self, answer: SampleAnswer) -> GateWeights | None:
        """Expert -> weight, and expert -> modality -> weight, means over the slots; None without a fusion network and for generated
        answers. A weight that is no number is None."""
        fusion = self.run.parts.model.fusion
        if fusion is None or answer.gate_expert is None or answer.gate_modality is None:
            return None
        modality = [_named(fusion.modalities, weights) for weights in answer.gate_modality]
        return _named(fusion.experts_built, answer.gate_expert), dict(zip(fusion.experts_built, modality, strict=True))


def chunks(samples: Iterable[AnyAsked], most: int | None = None) -> Iterator[list[AnyAsked]]:
    """Samples in lists of bounded length and bytes of features."""
    most = CHUNK_SAMPLES if most is None else most
    chunk: list[AnyAsked] = []
    size = 0
    for one in samples:
        chunk.append(one)
        size += feature_bytes(one.sample)
        if len(chunk) >= most or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def feature_bytes(sample: Sample | None) -> int:
    """Bytes of a sample's features."""
    streams = () if sample is None else (sample.audio_TF, sample.video_TF)
    return sum(stream.nbytes for stream in streams if stream is not None)


def _of_task(asked: Sequence[Asked], name: str) -> tuple[list[int], list[Sample]]:
    """The places of the samples that are asked a task and can be answered, and these samples."""
    places = [i for i, one in enumerate(asked) if one.sample is not None and name in one.tasks]
    return places, [sample for i in places if (sample := asked[i].sample) is not None]


def _length(sample: Sample) -> int:
    """As :meth:`trainer.data.dataset.SplitView.lengths`."""
    return len(sample.text) + sum(len(s) for s in (sample.audio_TF, sample.video_TF) if s is not None)


def _named(names: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    """JSON has no nan: what a diverged model gives is null."""
    return {name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)}
