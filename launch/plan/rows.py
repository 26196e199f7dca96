"""A micro-batch of given sizes: the sizes, and a batch of zeros that has them. Contents do not matter to what is recorded.

Shapes: B samples of a micro-batch, L positions of a padded row, P prefix tokens, T own tokens of a packed row, K pseudo
tokens, A answer tokens, n answer tokens of all samples, S text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from trainer.batch import Batch, Features, FusionInput, PackedBatch, Packing
from trainer.models.egmf import EGMF


class RowsRecord(TypedDict):
    """:class:`Rows` in the JSON of a plan; `longest`, and the sizes of the modalities, of one sample."""

    task: str
    layout: str
    samples: int
    positions: int
    longest: int
    text_tokens: int
    audio_frames: int
    video_frames: int


@dataclass(frozen=True)
class Rows:
    """A micro-batch of one task, in sizes.

    `own` are the positions of every sample beside the `prefix`, `answer` the target tokens taken for each (end token
    included), `groups` the calls of the fusion network: samples, and their longest text, audio and video.
    """

    task: str
    packed: bool
    prefix: int
    own: tuple[int, ...]
    answer: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Positions that a token may attend to."""
        return self.prefix + max(self.own)

    @property
    def positions(self) -> int:
        """Through the backbone, padding included."""
        return self.prefix + sum(self.own) if self.packed else len(self.own) * self.longest

    @property
    def read(self) -> int:
        """Tokens and frames that the fusion network reads, padding included."""
        return sum(samples * sum(longest) for samples, *longest in self.groups)

    def to_json(self) -> RowsRecord:
        text, audio, video = (max(group[i] for group in self.groups) for i in (1, 2, 3))
        return {
            "task": self.task,
            "layout": "packed" if self.packed else "padded",
            "samples": len(self.own),
            "positions": self.positions,
            "longest": self.longest,
            "text_tokens": text,
            "audio_frames": audio,
            "video_frames": video,
        }


def zero_batch(model: EGMF, rows: Rows) -> Batch | PackedBatch:
    """A batch of zeros in the layout and sizes of `rows`."""
    return _packed(model, rows) if rows.packed else _padded(model, rows)


def _packed(model: EGMF, rows: Rows) -> PackedBatch:
    """A packed batch of these sizes; what its tokens and features are does not matter."""
    B, K, A = len(rows.own), _pseudo_tokens(model), rows.answer
    end_B = torch.tensor(rows.own).cumsum(0)
    start_B = end_B - torch.tensor(rows.own)
    answer_at_BA = (end_B[:, None] - A + torch.arange(A)).clamp(min=0)
    return PackedBatch(
        task=rows.task,
        ids=[""] * B,
        prefix_ids_P=_ids(rows.prefix),
        own_ids_T=_ids(sum(rows.own)),
        place_BK=start_B[:, None] + torch.arange(K),
        cue_at_B=answer_at_BA[:, 0],
        packing=Packing(rows.prefix, torch.tensor(rows.own), sum(rows.own), max(rows.own)),
        answer_at_n=answer_at_BA.flatten(),
        answer_id_n=_ids(B * A),
        answer_slot_n=torch.arange(B * A),
        longest_answer=A,
        inputs=_inputs(model, rows),
        target_B=torch.zeros(B),
        weight_B=torch.ones(B),
        answer_B=torch.zeros(B, dtype=torch.long),
    )


def _padded(model: EGMF, rows: Rows) -> Batch:
    """The same of a padded batch."""
    B, L, A = len(rows.own), rows.longest, rows.answer
    (read,) = _inputs(model, rows)
    return Batch(
        task=rows.task,
        ids=[""] * B,
        input_ids_BL=_ids(B, L),
        context_length_B=torch.full((B,), L - A + 1),
        pseudo_start=rows.prefix,
        pseudo_tokens=_pseudo_tokens(model),
        answer_ids_BA=_ids(B, A),
        answer_mask_BA=torch.ones(B, A, dtype=torch.bool),
        text_ids_BS=read.text_ids_BS,
        text_mask_BS=read.text_mask_BS,
        audio=read.audio,
        video=read.video,
        target_B=torch.zeros(B),
        weight_B=torch.ones(B),
        answer_B=torch.zeros(B, dtype=torch.long),
    )


def _inputs(model: EGMF, rows: Rows) -> list[FusionInput]:
    encoded = {} if model.fusion is None else model.fusion.encoders.inputs[rows.task]
    widths = {str(name): width for name, width in encoded.items()}

    def features(name: str, samples: int, frames: int) -> Features:
        size = (samples, max(1, frames))
        values = torch.zeros(*size, max(1, widths.get(name, 0)))
        return Features(values, torch.ones(size, dtype=torch.bool), torch.zeros(size))

    return [
        FusionInput(
            _ids(n, max(1, text)),
            torch.ones(n, max(1, text), dtype=torch.bool),
            features("audio", n, audio),
            features("video", n, video),
        )
        for n, text, audio, video in rows.groups
    ]


def _pseudo_tokens(model: EGMF) -> int:
    return 0 if model.fusion is None else int(model.fusion.gate.slot_KD.shape[0])


def _ids(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long)
