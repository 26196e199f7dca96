"""What a predictor takes in and gives back.

Legend: K pseudo tokens, H hidden size of the backbone, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.batch import Sample

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 20  # faulty samples that a message names


@dataclass(frozen=True)
class Prediction:
    """The answer to one question about one sample.

    Attributes: `prediction`, a label or a number (None where the answer is not `valid`); `answer`, the text behind it;
    `probabilities`, answer -> p (None for generated answers); `gate_expert`, expert -> weight, and `gate_modality`, expert -> modality ->
    weight, means over the slots (None without a fusion network, and for generated answers); `pseudo_KH`, the pseudo tokens as they
    entered the backbone, float32 (None unless asked for); `notes`, what was repaired in the sample, cut or not used: of features that are
    nan, these frames are masked, and a stream of nothing else counts as missing.
    """

    id: str
    task: str
    prediction: str | float | None
    valid: bool
    answer: str
    probabilities: dict[str, float] | None = None
    gate_expert: dict[str, float | None] | None = None
    gate_modality: dict[str, dict[str, float | None]] | None = None
    pseudo_KH: np.ndarray | None = field(default=None, compare=False)
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """What JSON can hold, under the keys of `egmf predict`'s lines; `pseudo_tokens`, nested lists, where they were asked for."""
        line: dict[str, Any] = {
            "id": self.id,
            "task": self.task,
            "prediction": self.prediction,
            "valid": self.valid,
            "answer": self.answer,
            "probabilities": self.probabilities,
            "gate_expert": self.gate_expert,
            "gate_modality": self.gate_modality,
        }
        return line if self.pseudo_KH is None else line | {"pseudo_tokens": self.pseudo_KH.tolist()}


@dataclass(frozen=True)
class Prepared:
    """A sample that was checked and read. `tasks` are asked of it; `cost` is how many positions it adds to the batches that answer it;
    `notes` are repairs, texts that are cut, and keys that are not used."""

    id: str
    tasks: tuple[str, ...]
    cost: int
    sample: Sample
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be answered: its `id` ("" where it has none), where it stands, and every reason."""

    id: str
    where: str
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {'; '.join(self.faults)}"


class SampleError(ValueError):
    """Samples that cannot be answered: `rejected` has all of them, the message the first."""

    def __init__(self, rejected: Sequence[Rejected], given: int) -> None:
        self.rejected = tuple(rejected)
        rest = [f"  … and {len(rejected) - SHOWN} more"] if len(rejected) > SHOWN else []
        head = f"{len(rejected)} of {given} samples cannot be answered:"
        super().__init__("\n".join([head, *(f"  {one}" for one in self.rejected[:SHOWN]), *rest]))


@dataclass(frozen=True)
class PromptEmbeds:
    """A prompt as the backbone reads it, up to where its answer begins.

    Attributes: `embeds_LH`, input embeddings in the model's precision, on the CPU; `ids_L`, the tokens, of which those at the K places of
    pseudo tokens mean nothing; `pseudo_L`, true at these places; `answers`, answer -> its tokens, the end token included.
    """

    id: str
    task: str
    embeds_LH: Tensor
    ids_L: Tensor
    pseudo_L: Tensor
    answers: Mapping[str, list[int]]
