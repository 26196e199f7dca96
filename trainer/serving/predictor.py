"""A trained model that answers in Python: samples as dictionaries, dataclasses, pandas tables or clips in, typed answers out.

    from trainer import Predictor

    predictor = Predictor.load("runs/meld-s0")
    [answer] = predictor.predict([{"text": "I told you so."}])
    print(answer.prediction, answer.probabilities)

Legend: K pseudo tokens, H hidden size of the backbone, L tokens of a prompt, B samples of a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.answers.prediction_table import SampleAnswer
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.clips import ClipExtraction, ClipSettings, PreparedRecipe
from trainer.data.unlabelled.history import SeenSamples
from trainer.data.unlabelled.inputs import answer_keys, askable, recipe_of, unsure_of, usual
from trainer.data.unlabelled.reader import CheckedSample, UnlabelledReader
from trainer.distributed.world import World
from trainer.features.recipe_record import RecipeRecord
from trainer.results.answering import CHUNK_BYTES, CHUNK_SAMPLES, Answering, Length, chunks
from trainer.run.model_parts import OpenedModel
from trainer.serving.given import GivenSamples, chunks_of_given, has_features, samples_in
from trainer.serving.locate import open_model
from trainer.serving.precision import check_choice, choose_device, convert
from trainer.serving.prediction import Prediction, Prepared, PromptEmbeds, Rejected, SampleError
from trainer.tasks import Task

log = logging.getLogger(__name__)


class Predictor:
    """Answers samples with a trained model; made by :meth:`load`.

    Several threads may use one: batches pass the model one at a time, and the answers are those that each call alone would get.
    What is the same for all samples of a task, the keys and values of its prompt's beginning, is computed once and kept.

    Args:
        opened: a model on one process.
        clips: how clips are extracted.

    Attributes: `tasks`, name -> task; `inputs`, name -> what the model reads of it; `recipes`, name -> how features are extracted from
    clips, of tasks where that is known.
    """

    def __init__(self, opened: OpenedModel, *, clips: ClipSettings | None = None) -> None:
        if opened.world.size != 1:
            raise ValueError(f"a predictor answers on one process, and this model is opened on {opened.world.size}")
        self.opened = opened
        self.tasks: Mapping[str, Task] = opened.parts.tasks
        self.inputs: Mapping[str, TaskInput] = opened.parts.inputs
        self._clips = clips or ClipSettings()
        self._answering = Answering(opened)
        self._recipes_ready: dict[str, PreparedRecipe] = {}
        self._unsure = unsure_of(self._known_recipes())
        self._once = threading.Lock()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: str | None = None,
        quantization: str | None = None,
        tokens: int | None = None,
        trust_code: str | None = None,
        overrides: Sequence[str] = (),
        clips: ClipSettings | None = None,
    ) -> Predictor:
        """Open a trained model.

        Args:
            source: an exported folder, a run folder, or a registered model, ``models:/meld/3``.
            device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``fp32``, ``bf16`` or ``fp16``; default: as trained.
            quantization: of the backbone, ``none`` or ``nf4``; default: as trained.
            tokens: positions that pass through the backbone at once; default: `eval.tokens` of the run. It limits memory.
            trust_code: the hash of Python code that the model would bring along, once you have read it.
            overrides: other settings of the run, such as ``eval.batch=8``.
            clips: how clips are extracted.

        Raises:
            ValueError: nothing that can be opened, or what this machine cannot do.
        """
        world = World(0, 1, choose_device(device))
        check_choice(world.device, dtype, quantization)
        if isinstance(overrides, str):
            raise ValueError(f"overrides is a list of key=value, such as [{overrides!r}]")
        settings = [*overrides, *([] if tokens is None else [f"eval.tokens={tokens}"])]
        opened = open_model(source, world, settings, trust_code)
        convert(opened, dtype, quantization)
        return cls(opened, clips=clips)

    @property
    def recipes(self) -> dict[str, RecipeRecord]:
        """Task -> the recipe that makes its features from clips."""
        return {name: recipe for name, recipe in self._known_recipes().items() if recipe is not None}

    def predict(
        self, samples: Iterable[Any], *, task: str | None = None, pseudo_tokens: bool = False
    ) -> list[Prediction]:
        """The answers to some samples, in order; of several questions about a sample, one after the other.

        A sample has the keys of own data (`docs/data.md`): `id`, `text`, `audio` and `video` (arrays [T, F], nested lists, or paths of
        .npy and .npz files), their `rate`, `speaker`, `dialogue`, `turn`, `task`; or a `clip` with `start` and `end`. All are held in
        memory and answered in the batches of an evaluation of these samples; :meth:`stream` takes any number. Previous utterances
        of a dialogue are looked for among them.

        Args:
            task: of samples that name none, where the model has several tasks.
            pseudo_tokens: also give the pseudo tokens [K, H] of each sample.

        Raises:
            SampleError: some samples cannot be answered; it has all of them, with every reason.
            ValueError: what is asked for cannot be given.
        """
        self._check_pseudo(pseudo_tokens)
        found = self.prepare(samples, task=task)
        if rejected := [one for one in found if isinstance(one, Rejected)]:
            raise SampleError(rejected, len(found))
        return self.answer([one for one in found if isinstance(one, Prepared)], pseudo_tokens=pseudo_tokens)

    def stream(
        self, samples: Iterable[Any], *, task: str | None = None, pseudo_tokens: bool = False
    ) -> Iterator[Prediction | Rejected]:
        """The answers to any number of samples, in order, in bounded memory: a few hundred are read and answered together, as `egmf
        predict` does it. A sample that cannot be answered comes back with the reasons.

        Previous utterances of a dialogue are looked for among the samples before, and among those that are read together.

        Raises:
            ValueError: what is asked for cannot be given.
        """
        self._check_pseudo(pseudo_tokens)
        self._check_task(task)
        return self._streamed(samples, task, pseudo_tokens)

    def prepare(self, samples: Iterable[Any], *, task: str | None = None) -> list[Prepared | Rejected]:
        """Check samples, read their features and extract their clips, in order; the model does nothing yet.

        Raises:
            ClipsError: a clip, and no recipe to extract it by.
            ValueError: a task that the model does not have.
        """
        self._check_task(task)
        return [one for part in self._prepared(list(samples_in(samples)), task) for one in part]

    def answer(self, prepared: Sequence[Prepared], *, pseudo_tokens: bool = False) -> list[Prediction]:
        """The answers to samples of :meth:`prepare`, as :meth:`predict` gives them."""
        self._check_pseudo(pseudo_tokens)
        found = self._answering.answers(prepared, pseudo_tokens=pseudo_tokens)
        return [self._prediction(prepared[i], name, answer) for i, name, answer in found]

    @torch.no_grad()
    def prompt_embeds(self, sample: Any, *, task: str | None = None) -> PromptEmbeds:
        """A sample's prompt as input embeddings [L, H]: what vLLM takes as `prompt_embeds` and transformers as `inputs_embeds`.

        The log-probability of an answer behind it is the sum over the answer's tokens, its end token included; that is what
        `eval.score=full` scores by.

        Args:
            sample: one sample, or one of :meth:`prepare`, which may have previous utterances of its dialogue.
            task: where several questions are asked of the sample, the one.

        Raises:
            SampleError: it cannot be answered.
            ValueError: several questions, or a task that is not asked of the sample.
        """
        [one] = [sample] if isinstance(sample, Prepared) else self.prepare([sample], task=task)
        if isinstance(one, Rejected):
            raise SampleError([one], 1)
        name = one.tasks[0] if task is None and len(one.tasks) == 1 else task
        if name is None or name not in one.tasks:
            raise ValueError(f"{', '.join(one.tasks)} are asked of the sample {one.id}: name one of them as task")
        known, collate = self.tasks[name], self.opened.parts.collators[name]
        embeds_LH, ids_L = self._answering.prompt(name, one.sample)
        start = len(collate.prefix)
        pseudo_L = torch.zeros(len(ids_L), dtype=torch.bool)
        pseudo_L[start : start + collate.pseudo_tokens] = True
        words = self.opened.parts.tries[name].answers if known.kind == "multilabel" else known.answers()
        answers = dict(zip(words, map(list, collate.answers), strict=True))
        return PromptEmbeds(one.id, name, embeds_LH, ids_L, pseudo_L, answers)

    def _known_recipes(self) -> dict[str, RecipeRecord | None]:
        return {name: one.recipe for name, one in self.inputs.items()}

    def _check_task(self, task: str | None) -> None:
        known = askable(self.inputs)
        if task is not None and task not in known:
            raise ValueError(f"task {task!r} is none of the model's: {', '.join(known)}")

    def _check_pseudo(self, wanted: bool) -> None:
        config = self.opened.config
        if wanted and self.opened.parts.model.fusion is None:
            raise ValueError(
                "pseudo_tokens: the model has no fusion network (model.fusion.pseudo_tokens=0), so none are made"
            )
        if wanted and config.eval.mode == "generate":
            raise ValueError("pseudo_tokens: answers are generated without them; score answers (eval.mode=score)")

    def _streamed(
        self, samples: Iterable[Any], task: str | None, pseudo_tokens: bool
    ) -> Iterator[Prediction | Rejected]:
        first = 0
        with contextlib.closing(SeenSamples()) as seen:
            for values in chunks_of_given(samples_in(samples), CHUNK_SAMPLES, CHUNK_BYTES):
                for part in self._prepared(values, task, first, seen):
                    good = [one for one in part if isinstance(one, Prepared)]
                    answers = iter(self.answer(good, pseudo_tokens=pseudo_tokens))
                    for one in part:
                        yield from [one] if isinstance(one, Rejected) else itertools.islice(answers, len(one.tasks))
                first += len(values)

    def _prepared(
        self, values: Sequence[Any], task: str | None, first: int = 0, seen: SeenSamples | None = None
    ) -> Iterator[list[Prepared | Rejected]]:
        """The samples in lists of bounded size."""
        history = self.opened.config.data.history
        chosen = usual(self.inputs) if task is None else task
        recipe = partial(recipe_of, self.inputs, chosen)
        extraction = ClipExtraction(recipe, self._clips, keep=history > 0, ready=self._recipes_ready)
        given = GivenSamples(values, extraction, task=task, answers=answer_keys(self.inputs), first=first)
        with UnlabelledReader(given, self.inputs, task=task, history=history, seen=seen) as reader:
            for part in chunks(reader):
                self._warn_of_features(values)
                lengths = self._answering.lengths(part)
                yield [self._finished(one, length) for one, length in zip(part, lengths, strict=True)]

    def _finished(self, checked: CheckedSample, length: Length | None) -> Prepared | Rejected:
        fault = self._answering.too_long(length)
        faults = [*checked.faults, *([] if fault is None else [fault])]
        if faults or checked.sample is None or length is None:
            return Rejected(checked.id, checked.where, tuple(faults))
        notes, config = list(checked.notes), self.opened.config
        most, limit = config.data.max_text_tokens, self.opened.parts.limit
        if length.text > most:
            notes.append(f"text: cut to its last {most} tokens (data.max_text_tokens of the run), it has {length.text}")
        if limit is not None and length.positions > limit.positions:
            notes.append(
                f"needs {length.positions} positions, more than {config.model.backbone.name} was trained on "
                f"({limit.positions}), where it may answer worse"
            )
        return Prepared(checked.sample.id, checked.tasks, length.cost, checked.sample, tuple(notes))

    def _warn_of_features(self, values: Sequence[Any]) -> None:
        """Say once that nothing tells by what recipe given features were extracted, where it matters."""
        with self._once:
            if self._unsure and any(has_features(value) for value in values):
                log.warning("%s", self._unsure)
                self._unsure = ""

    def _prediction(self, prepared: Prepared, task: str, answer: SampleAnswer) -> Prediction:
        gate_expert, gate_modality = self._answering.gates(answer) or (None, None)
        return Prediction(
            id=prepared.id,
            task=task,
            prediction=answer.prediction,
            valid=answer.valid,
            answer=answer.answer,
            probabilities=self._answering.probabilities(task, answer),
            gate_expert=gate_expert,
            gate_modality=gate_modality,
            pseudo_KH=answer.pseudo_KH,
            notes=prepared.notes,
        )
