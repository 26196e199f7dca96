"""The model behind the server: what it takes of a request, and how its samples become samples that are prepared for it.

It imports torch, so it is imported by the thread that loads the model, while the process already says that it is loading.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.data.unlabelled.inputs import askable
from trainer.serving.http.asking import Asked, Asking, refuse_rejected
from trainer.serving.http.batching import Answer
from trainer.serving.http.clips import ClipWorkers
from trainer.serving.http.description import describe_tasks, one_recipe
from trainer.serving.http.faults import Fault, RefusedError
from trainer.serving.http.limits import Limits
from trainer.serving.http.settings import ClipProcesses, ModelChoice
from trainer.serving.prediction import Prediction, Prepared, Rejected
from trainer.serving.predictor import Predictor

log = logging.getLogger(__name__)

LARGE = (
    4 << 20
)  # bytes of JSON, which takes several times as many when it is parsed: larger ones are, one after the other
Hold = Callable[[int], None]


@dataclass
class Work:
    """A request that was read: samples for the model, in order, and what was noted of each."""

    asked: Asked
    prepared: list[Prepared]
    notes: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The answer to the request, in plain values."""
        left = [
            *([] if self.asked.probabilities else ["probabilities"]),
            *([] if self.asked.gates else ["gate_expert", "gate_modality"]),
        ]
        lines = [{key: value for key, value in one.plain().items() if key not in left} for one in predictions]
        return {"predictions": lines, "notes": self.notes}


class ServedModel:
    """A predictor, and what the server adds to it. Its methods are thread-safe."""

    def __init__(self, predictor: Predictor, limits: Limits, clips: ClipProcesses) -> None:
        self.predictor, self._large = predictor, threading.Lock()
        self._clips, why = _clip_workers(predictor, limits, clips)
        width = max((width for one in predictor.inputs.values() for width in one.widths.values()), default=0)
        self._asking = Asking(limits, list(askable(predictor.inputs)), width, why)
        self.tasks = describe_tasks(predictor, limits, why)
        self.tokens = predictor.opened.config.eval.tokens
        self.batch = predictor.opened.config.eval.batch

    @classmethod
    def load(cls, choice: ModelChoice, limits: Limits, clips: ClipProcesses) -> ServedModel:
        """Raises ValueError where there is nothing that can be opened."""
        predictor = Predictor.load(
            choice.source,
            device=choice.device,
            dtype=choice.dtype,
            quantization=choice.quantization,
            tokens=choice.tokens,
            trust_code=choice.trust_code,
        )
        return cls(predictor, limits, clips)

    @property
    def answer(self) -> Answer:
        """:meth:`Predictor.answer` for a thread of its own: CUDA's current device is that of a thread."""
        device = self.predictor.opened.world.device

        def answer(prepared: Sequence[Prepared]) -> list[Prediction]:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return self.predictor.answer(prepared)

        return answer

    def read(self, body: bytearray, content_type: str | None, hold: Hold, take: Hold) -> Work:
        """Read, check and prepare the samples of a body; a clip is extracted first.

        Args:
            content_type: of a form; None: the body is JSON.
            hold: is called with bytes before they are held.
            take: is called with the number of samples before they are prepared.

        Raises:
            RefusedError: the request is refused, with all faults.
        """
        if content_type is None:
            with self._large if len(body) > LARGE else contextlib.nullcontext():
                asked = self._asking.of_json(body, hold)
        else:
            hold(2 * len(body))  # for the copies that are made of it
            asked = self._asking.of_form(bytes(body), content_type, hold)
        take(len(asked.samples))
        self._refuse_impossible(asked)
        extra: tuple[str, ...] = ()
        if asked.clip is not None:
            assert self._clips is not None
            extracted = self._clips.extract(asked.clip, asked.samples[0].get("text"))
            asked.samples[0] |= extracted.values
            asked.clip, extra = None, extracted.notes
        work = Work(asked, [])
        rejected: dict[str, tuple[str, ...]] = {}
        for i, one in enumerate(self.predictor.prepare(asked.samples)):
            if isinstance(one, Rejected):
                rejected[one.where] = one.faults
                continue
            work.prepared.append(one)
            if notes := [*(extra if i == 0 else ()), *one.notes]:
                work.notes.append({"id": one.id, "notes": notes})
        refuse_rejected(rejected)
        asked.samples.clear()
        return work

    def close(self) -> None:
        """End the processes that extract clips."""
        if self._clips is not None:
            self._clips.close()

    def remove_files(self) -> None:
        """Remove the clips that are being read."""
        if self._clips is not None:
            self._clips.remove_files()

    def _refuse_impossible(self, asked: Asked) -> None:
        """Raise RefusedError where what is asked for does not exist."""
        opened = self.predictor.opened
        generated, fusion = opened.config.eval.mode == "generate", opened.parts.model.fusion is not None
        faults = []
        if asked.probabilities and generated:
            faults.append(Fault("options.probabilities", "generated answers have none"))
        if asked.gates and (generated or not fusion):
            why = "answers are generated without them" if generated else "the model has no fusion network"
            faults.append(Fault("options.gates", why))
        if faults:
            raise RefusedError(422, "bad_options", "the model cannot give what is asked for", faults)


def _clip_workers(
    predictor: Predictor, limits: Limits, settings: ClipProcesses
) -> tuple[ClipWorkers | None, str | None]:
    """What extracts clips, or why they are not taken."""
    if not settings.workers:
        return None, "the server was started without (--clip-workers 0)"
    recipe, why = one_recipe(predictor.inputs)
    if recipe is None:
        return None, why
    try:
        return ClipWorkers(recipe, settings.workers, settings.device, limits.clip_seconds), None
    except (ValueError, ImportError) as error:
        log.warning("clips are not taken: %s", error)
        return None, "this machine lacks what the recipe needs, see the server's log"
