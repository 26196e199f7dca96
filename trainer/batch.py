"""What travels between the rooms: `data` makes samples, batches and answer tries; `models` reads them.

Shapes: B samples, L positions of a row, S text tokens, A answer tokens, T frames, F features of a frame,
N nodes of an answer trie, C answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

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
    history: list[tuple[str, str]] = field(default_factory=list)  # (speaker, text), oldest first


@dataclass
class Features:
    """Padded features of one modality. `time_BT` is the common axis of audio and video, in seconds; where a rate is not
    known, the clip is taken to last 10 seconds. T is at least 1; a missing modality has a mask of all False and zeros."""

    values_BTF: Tensor
    mask_BT: Tensor
    time_BT: Tensor


@dataclass
class Batch:
    """Samples of one task, padded on the right.

    A row is `prefix, K pseudo-token places, history and text, cue, answer without its end token`. Its first
    `pseudo_start` tokens are the task's constant prefix, the same in every row; ids at the K places are meaningless.
    `answer_ids_BA` are the targets, end token included: target a is predicted at position `context_length_B - 1 + a`.
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

    def __len__(self) -> int:
        return int(self.input_ids_BL.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on `device`; `dtype` is that of the features (times, targets and weights stay float32)."""
        out = _to(self, device)
        if dtype is not None:
            out.audio.values_BTF = out.audio.values_BTF.to(dtype)
            out.video.values_BTF = out.video.values_BTF.to(dtype)
        return out

    def pin_memory(self) -> Batch:
        return _map(self, lambda t: t.pin_memory())


@dataclass
class AnswerTrie:
    """All answers of a task as one tree of tokens, shared beginnings stored once, parents before children.

    Node n holds `token_N[n]`, at depth `depth_N[n]` (0: follows the cue), under `parent_N[n]` (-1: the cue). Answer c is
    the path to node `leaf_C[c]`, followed by the token `end`. `ancestors_NN[n, m]`: node n sees node m (itself included).
    """

    token_N: Tensor
    parent_N: Tensor
    depth_N: Tensor
    leaf_C: Tensor
    ancestors_NN: Tensor
    end: int
    answers: list[str]

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


def _map(value: Any, change: Any) -> Any:
    out = {}
    for f in fields(value):
        v = getattr(value, f.name)
        out[f.name] = change(v) if isinstance(v, Tensor) else _map(v, change) if isinstance(v, Features) else v
    return replace(value, **out)
