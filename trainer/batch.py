"""What travels between the rooms: `data` makes samples, batches and answer tries; `models` reads them.

Shapes: B samples, L positions of a padded row, T frames or tokens of a packed row, P prefix tokens, K pseudo tokens, S text
tokens, A answer tokens, F features of a frame, n answer tokens of all samples, N nodes of an answer trie, Q places of choices in
it, W options of a choice, m tokens that are options, C answers, D choices of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Sample:
    """One utterance or clip, as a prepared dataset gives it.

    A modality that is missing is None. `*_mask_T` is False on frames that were repaired (nan or inf as published): they
    hold zeros and take part in nothing. `target` is the label's index (classification) or the unrounded truth.
    """

    id: str
    text: str
    target: float
    audio_TF: np.ndarray | None = None
    video_TF: np.ndarray | None = None
    audio_mask_T: np.ndarray | None = None
    video_mask_T: np.ndarray | None = None
    speaker: str | None = None
    dialogue: str | None = None
    turn: int | None = None
    kind: str | None = None
    share_C: np.ndarray | None = (
        None  # of annotators that gave each label, float32, sum 1; `target` is the label of most
    )
    history: list[tuple[str, str]] = field(default_factory=list)  # (speaker, text), oldest first


@dataclass(frozen=True)
class Standardisation:
    """How the features of one modality are standardised, float32 [F]: ``clip((x - mean_F) * scale_F, -limit, limit)``."""

    mean_F: np.ndarray
    scale_F: np.ndarray
    limit: float


@dataclass
class Features:
    """Padded features of one modality. `time_BT` is the common axis of audio and video, in seconds; where a rate is not
    known, the clip is taken to last 10 seconds. T is at least 1; a missing modality has a mask of all False and zeros."""

    values_BTF: Tensor
    mask_BT: Tensor
    time_BT: Tensor


@dataclass
class FusionInput:
    """What the fusion network reads of some samples, padded to the longest of them.

    A dummy group's output is ignored: it keeps the number of calls equal across ranks.
    """

    text_ids_BS: Tensor  # the sample's own text; S is at least 1
    text_mask_BS: Tensor
    audio: Features
    video: Features
    dummy: bool = False

    def __len__(self) -> int:
        return int(self.text_ids_BS.shape[0])


@dataclass
class Batch:
    """Samples of one task, padded on the right.

    A row is `prefix, K pseudo-token places, history and text, cue, answer without its end token`. Its first
    `pseudo_start` tokens are the task's constant prefix, the same in every row; ids at the K places are meaningless.
    `answer_ids_BA` are the targets, end token included (of a constrained loss: up to the last choice between answers): target a is
    predicted at position `context_length_B - 1 + a`.
    A batch for scoring has no answers: A is 0 and rows end with the cue.
    """

    task: str
    ids: list[str]
    input_ids_BL: Tensor
    context_length_B: Tensor
    pseudo_start: int
    pseudo_tokens: int
    answer_ids_BA: Tensor
    answer_mask_BA: Tensor
    text_ids_BS: Tensor  # the sample's own text, for the fusion network; S is at least 1
    text_mask_BS: Tensor
    audio: Features
    video: Features
    target_B: Tensor
    weight_B: Tensor  # 0: the sample only fills a place
    choices: Choices | None = None  # of B x A answer tokens, row by row, padding included
    trie: AnswerTrie | None = None  # of a training batch whose loss needs the probabilities of all answers
    error_weight: float = 0.0  # of the expected absolute error over the trie's numbers in the loss
    answer_B: Tensor | None = None  # index of the answer among the task's; None in a batch for scoring
    share_BC: Tensor | None = None  # of the trie's answers in the target; then there are no answer tokens
    most_samples: int = 0  # of the batches that all ranks pass through the model at once; 0: not known

    def __len__(self) -> int:
        return int(self.input_ids_BL.shape[0])

    @property
    def positions(self) -> int:
        """Positions that pass through the backbone, padding included."""
        return self.input_ids_BL.numel()

    @property
    def inputs(self) -> list[FusionInput]:
        return [FusionInput(self.text_ids_BS, self.text_mask_BS, self.audio, self.video)]

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, *, trie: AnswerTrie | None = None
    ) -> Batch:
        """The batch on `device`; `dtype` is that of the features (times, targets and weights stay float32).

        A model takes features in float32 whatever its own precision is: its encoders standardise them before they cast.
        `trie`: the batch's own as it is on the device already, where it has one.
        """
        if trie is None or self.trie is None:
            return _cast(_to(self, device), dtype)
        return replace(_cast(_to(replace(self, trie=None), device), dtype), trie=trie)

    def pin_memory(self) -> Batch:
        return _map(self, lambda t: t.pin_memory())


@dataclass
class PackedBatch:
    """Samples of one task in one row without padding: the task's constant prefix once, then the samples.

    A sample's own tokens are `K pseudo-token places, history and text, cue`, then its predicted tokens without the last one
    (training) or the nodes of an answer trie (scoring: `packing.trie`). A training sample whose loss needs the
    probabilities of all answers carries the trie too: its answer's tokens are then those of the trie. Every index counts own tokens, the prefix left
    out. The n predicted tokens of all samples stand one behind another: the token at `answer_at_n`
    predicts `answer_id_n`, which is entry `answer_slot_n` of a flat `[B, A]`.
    """

    task: str
    ids: list[str]
    prefix_ids_P: Tensor
    own_ids_T: Tensor
    place_BK: Tensor
    cue_at_B: Tensor  # the last token before the answer
    packing: Packing
    answer_at_n: Tensor
    answer_id_n: Tensor
    answer_slot_n: Tensor
    longest_answer: int  # A; 0 in a row that is to be scored
    inputs: list[FusionInput]  # of the samples in order, in groups of like length
    target_B: Tensor
    weight_B: Tensor  # 0: the sample only fills a place
    choices: Choices | None = None  # of the n answer tokens
    error_weight: float = 0.0  # of the expected absolute error over the trie's numbers in the loss
    answer_B: Tensor | None = None  # index of the answer among the task's; None in a batch for scoring
    share_BC: Tensor | None = None  # of the trie's answers in the target; then there are no answer tokens
    most_samples: int = 0  # of the batches that all ranks pass through the model at once; 0: not known

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pseudo_tokens(self) -> int:
        return int(self.place_BK.shape[1])

    @property
    def positions(self) -> int:
        """Positions that pass through the backbone, the prefix included."""
        return self.packing.prefix + self.packing.total

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, *, trie: AnswerTrie | None = None
    ) -> PackedBatch:
        """As :meth:`Batch.to`."""
        if trie is None or self.packing.trie is None:
            return _cast(_to(self, device), dtype)
        moved = _cast(_to(replace(self, packing=replace(self.packing, trie=None)), device), dtype)
        return replace(moved, packing=replace(moved.packing, trie=trie))

    def pin_memory(self) -> PackedBatch:
        return _map(self, lambda t: t.pin_memory())


@dataclass
class Choices:
    """The options at each answer token: the tokens that continue, or end, some answer of the task there.

    `option_nW` counts tokens of `token_m`. `share` of every target is spread evenly over the options. `chosen_n`: which option the
    answer's token is, where its probability is one among the options alone; None: among the vocabulary.
    """

    token_m: Tensor
    option_nW: Tensor
    mask_nW: Tensor
    share: float
    chosen_n: Tensor | None = None


@dataclass
class AnswerTrie:
    """What a row carries of all answers of a task, and how their scores add up; :mod:`trainer.answer_tree` makes it.

    Node n holds `token_N[n]`, at depth `depth_N[n]` (0: follows the cue); parents stand before children, and node n sees node m
    (itself included) where `ancestors_NN[n, m]`. `depth` is the depth of the deepest, counted from 1; 0: there are none.

    Place `place_Q[q]` (0: the cue's end, n + 1: node n) has the options ``token_m[option_QW[q]]`` where `mask_QW[q]`. Answer c is the
    options `step_CD[c]`, counted through the Q x W of all places; Q x W itself stands behind its last, and adds nothing. Their
    probabilities are those among a place's options (`constrained`), or in the vocabulary. `value_C` are the numbers that the
    answers mean; None where they are labels.
    """

    token_N: Tensor
    depth_N: Tensor
    ancestors_NN: Tensor
    depth: int
    place_Q: Tensor
    token_m: Tensor
    option_QW: Tensor
    mask_QW: Tensor
    step_CD: Tensor
    constrained: bool
    answers: list[str]
    value_C: Tensor | None = None

    def to(self, device: torch.device | str) -> AnswerTrie:
        return _to(self, device)


@dataclass
class Packing:
    """Who stands where in one packed row: P prefix tokens, then the tokens of B samples, one sample behind another.

    Every token sees the prefix (the prefix itself: its beginning) and the tokens of its own sample up to itself, and
    positions restart at P for every sample. With a `trie`, each sample ends with the N nodes of that trie: they see their
    sample's context and their ancestors, and stand at ``P + context + depth``.

    Sizes are plain numbers beside the tensor, so that no reader waits for a device.
    """

    prefix: int  # P
    length_B: Tensor  # tokens of each sample, its nodes included; at least 1
    total: int  # their sum
    longest: int  # their maximum
    trie: AnswerTrie | None = None


def _to(value: T, device: torch.device | str) -> T:
    return _map(value, lambda t: t.to(device, non_blocking=True))


def _cast(batch: T, dtype: torch.dtype | None) -> T:
    """The features of `batch` in `dtype`; in place."""
    if dtype is not None:
        holders: list[Any] = batch.inputs if isinstance(batch, PackedBatch) else [batch]
        for holder in holders:
            for features in (holder.audio, holder.video):
                features.values_BTF = features.values_BTF.to(dtype)
    return batch


def _map(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """`value` with every tensor in it changed; dataclasses and lists of them are copied."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = change(value)
    elif isinstance(value, list):
        changed = [_map(inner, change) if is_dataclass(inner) else inner for inner in value]
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return cast(T, changed)
