"""Positions and micro-batches of a run's steps, from the run's own planner: over the prepared data where there are any, else
under assumptions that are listed.

Shapes: N samples of a task's training split, or of one step where there are no data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from launch.plan.rows import Rows, RowsRecord
from trainer.answers.tree import task_tree
from trainer.config import MODALITIES, RunConfig
from trainer.data.collate import Collator, prompt_language, prompt_texts
from trainer.data.dataset import PreparedDataset, open_dataset
from trainer.data.folds import fold_choice
from trainer.data.imbalance import training_sampler
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.folder import read_record
from trainer.data.sampling import GlobalBatchSampler, Limits, MicroBatch, Sizes, all_micro_batches
from trainer.models.backbone.loading import BackboneError, faults_of_present_files, load_tokenizer
from trainer.models.backbone.positions import PositionLimit, position_limit, skeleton
from trainer.questions import RunTask, tasks_of_run
from trainer.run.assemble import make_objective
from trainer.run.guards.probe import largest
from trainer.run.lengths import PositionsError, check_positions, log_lines, measure_splits, splits_of_run
from trainer.tasks import UNSPACED, Task
from trainer.text import Pieces, start_tokens

CHARACTERS_PER_TOKEN = {"en": 4.0, "zh": 1.5}  # where there is no tokenizer
ASSUMED_TEXT = 25  # tokens of a sample's own text, where there are no data
ASSUMED_LONGEST, ASSUMED_WIDTH = 500, 512  # frames of audio and video, and their features
STEPS_LOOKED_AT = 200


class LengthsRecord(TypedDict):
    """:class:`Lengths` in the JSON of a plan."""

    largest: list[RowsRecord]
    widths: dict[str, dict[str, int]]
    answers: dict[str, int]
    positions_per_sample: float
    step_positions: float
    micro_batches: float
    micro_steps: float
    samples: dict[str, int | None]
    steps_per_epoch: int | None
    assumptions: list[str]
    shared: dict[str, str]


@dataclass
class Lengths:
    """What a plan needs to know of the data.

    `largest` are the micro-batches of the run that need most, each once: by positions, by what the fusion network reads,
    and by samples times the longest of them, to which blocks of attention are padded. The rest are means over optimizer steps: `step_positions` and `micro_batches` of all ranks
    together, `micro_steps` of the rank that has most. `assumptions` says, in sentences, what was not read from data. What
    is not known is None. `shared` are the tasks of one dataset, and the name of the encoders that they share.
    """

    largest: list[Rows]
    widths: dict[str, dict[str, int]]
    answers: dict[str, int]
    positions_per_sample: float
    step_positions: float
    micro_batches: float
    micro_steps: float
    samples: dict[str, int | None]
    steps_per_epoch: int | None
    assumptions: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> LengthsRecord:
        return {
            "largest": [rows.to_json() for rows in self.largest],
            "widths": self.widths,
            "answers": self.answers,
            "positions_per_sample": self.positions_per_sample,
            "step_positions": self.step_positions,
            "micro_batches": self.micro_batches,
            "micro_steps": self.micro_steps,
            "samples": self.samples,
            "steps_per_epoch": self.steps_per_epoch,
            "assumptions": self.assumptions,
            "shared": self.shared,
        }


@dataclass
class _Needs:
    """What a task's samples need. Without data `sizes` are those of a step of mean samples, `extreme` of one of the longest."""

    task: str
    answer: int  # tokens of the longest, end token included
    sizes: Sizes
    extreme: Sizes | None
    data: PreparedDataset | None

    def rows(self, micro: MicroBatch, sizes: Sizes, packed: bool) -> Rows:
        groups, start = [], 0
        for size in micro.groups:
            longest = sizes.read_N3[list(micro.indices[start : start + size])].max(0)
            groups.append((size, *(int(n) for n in longest)))
            start += size
        own = tuple(int(n) for n in sizes.tokens_N[list(micro.indices)])
        return Rows(self.task, packed, sizes.prefix, own, self.answer, tuple(groups))


def run_lengths(config: RunConfig, ranks: int, *, positions: int | None = None, samples: int | None = None) -> Lengths:
    """Look at the run's data.

    Args:
        positions: of a sample's whole prompt with its answer; stands in place of what the data or the assumptions say.
        samples: training samples of an epoch, where there are no data.

    Raises:
        ValueError: `positions` is no more than the instruction has.
    """
    notes: list[str] = []
    tokenizer = _tokenizer(config, notes)
    limit = None if tokenizer is None else position_limit(skeleton(config.model.backbone))
    needs = {}
    asked = tasks_of_run(config.tasks)
    for one in asked:
        found = _needs(config, one, tokenizer, limit, notes)
        needs[one.task.name] = found if positions is None else _stated(found, positions, notes)
    limits = Limits.of_training(config, "cuda")
    order = _order(config, needs)
    steps = [] if order is None else [order.step(i) for i in range(min(order.steps_per_epoch, STEPS_LOOKED_AT))]
    batches: list[tuple[str, Sequence[int]]] = [(step.task, step.indices) for step in steps]
    if order is None:  # one step of each task, the first samples of those that have data
        batches = [
            (name, range(min(config.train.global_batch, len(need.sizes.tokens_N)))) for name, need in needs.items()
        ]
    planned = [
        [
            needs[name].rows(micro, needs[name].sizes, limits.packed)
            for micro in all_micro_batches(indices, needs[name].sizes, limits, ranks)
        ]
        for name, indices in batches
    ]
    step_positions = float(np.mean([sum(rows.positions for rows in step) for step in planned]))
    per_epoch = None if order is None else order.steps_per_epoch
    if order is None and samples is not None:
        per_epoch = math.ceil(samples / config.train.global_batch)
        notes.append(f"{samples} training samples, as stated")
    return Lengths(
        largest=_largest([rows for step in planned for rows in step], needs, limits, config.train.global_batch, ranks),
        widths={name: _widths(need.data) for name, need in needs.items()},
        answers={one.task.name: len(one.task.answers(config.data.answers)) for one in asked},
        positions_per_sample=step_positions / float(np.mean([len(indices) for _, indices in batches])),
        step_positions=step_positions,
        micro_batches=float(np.mean([len(step) for step in planned])),
        micro_steps=float(np.mean([math.ceil(len(step) / ranks) for step in planned])),
        samples={name: None if need.data is None else len(need.data["train"]) for name, need in needs.items()},
        steps_per_epoch=per_epoch,
        assumptions=notes,
        shared=_shared(config, asked),
    )


def _shared(config: RunConfig, asked: Sequence[RunTask]) -> dict[str, str]:
    """Task -> the name of its encoders, of tasks that have one dataset; see :func:`trainer.data.task_input.shared_encoders`."""
    paths = [one.path(config.data.path) for one in asked]
    first = {path: one.dataset for one, path in zip(asked[::-1], paths[::-1], strict=True)}
    return {one.task.name: first[path] for one, path in zip(asked, paths, strict=True) if paths.count(path) > 1}


def _order(config: RunConfig, needs: dict[str, _Needs]) -> GlobalBatchSampler | None:
    data = {name: need.data for name, need in needs.items() if need.data is not None}
    if len(data) < len(needs):
        return None
    return training_sampler(config, {name: opened["train"] for name, opened in data.items()})


def _largest(planned: Sequence[Rows], needs: dict[str, _Needs], limits: Limits, most: int, ranks: int) -> list[Rows]:
    """Of the steps' micro-batches, and of those that a run tries before its first step, the ones that need most."""
    every = list(planned)
    for need in needs.values():
        for sizes in (need.sizes, need.extreme):
            if sizes is not None:
                every += [need.rows(micro, sizes, limits.packed) for micro in largest(sizes, limits, most, ranks)]
    most_of = (lambda rows: rows.positions, lambda rows: rows.read, lambda rows: len(rows.own) * rows.longest)
    return list(dict.fromkeys(max(every, key=need) for need in most_of))


def _tokenizer(config: RunConfig, notes: list[str]) -> PreTrainedTokenizerBase | None:
    if config.model.backbone.name != "tiny":
        faults = faults_of_present_files(config.model.backbone)
        notes.extend(f"a run would refuse {config.model.backbone.name}: {fault}" for fault in faults)
        with contextlib.suppress(BackboneError):
            return load_tokenizer(config.model.backbone)
    per = ", ".join(f"{n:g} in {language}" for language, n in CHARACTERS_PER_TOKEN.items())
    notes.append(f"no tokenizer here: characters per token taken as {per}")
    return None


def _needs(
    config: RunConfig,
    one: RunTask,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: PositionLimit | None,
    notes: list[str],
) -> _Needs:
    task, data = one.task, _data(config, one, notes)
    if tokenizer is None or data is None:
        return _assumed(config, task, tokenizer, data, notes)
    fusion = config.model.fusion
    tree = task_tree(task, tokenizer, config.data.answers, prompt_language(task, config.data))
    collate = Collator(
        task, tokenizer, config.data, widths=data.widths, rates=data.rates, pseudo_tokens=fusion.pseudo_tokens,
        modalities=fusion.modalities, seed=config.train.seed,
        objective=make_objective(config, task, tree, data["train"]),
    )  # fmt: skip
    if (carried := collate.objective.trie_in_batch) is not None and len(carried.token_N):
        notes.append(_riding(task, len(carried.token_N)))
    name, splits = task.name, splits_of_run(config)
    tries = {name: tree.trie(config.eval.score)}
    found = measure_splits(config, {name: data}, {name: collate}, tries, splits, limit)
    notes.extend(log_lines(found, config))
    try:
        notes.extend(check_positions(found, limit, config))
    except PositionsError as error:
        notes.append(f"a run would refuse this: {'; '.join(line.strip() for line in str(error).splitlines())}")
    return _Needs(task.name, max(map(len, collate.answers)), collate.sizes(data["train"]), None, data)


def _riding(task: Task, nodes: int, about: str = "") -> str:
    return (
        f"task {task.name}: the training loss puts {about}{nodes} positions of answers behind every sample; they are "
        "counted, the logits at them are not"
    )


def _assumed(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
    data: PreparedDataset | None,
    notes: list[str],
) -> _Needs:
    """Without data, without a tokenizer, or without both."""
    language = prompt_language(task, config.data)

    pieces = None if tokenizer is None else Pieces(tokenizer)

    def tokens(text: str) -> int:
        per = CHARACTERS_PER_TOKEN["zh" if language.split("-")[0] in UNSPACED else "en"]
        return math.ceil(len(text) / per) if pieces is None else len(pieces.following(text))

    before, after = prompt_texts(task, config.data)
    prefix = tokens(before) + (1 if tokenizer is None else len(start_tokens(tokenizer)))
    answers = [tokens(text) for text in task.answer_texts(config.data.answers, language)]
    answer = 1 + max(answers)
    most, history, modalities = config.data.max_text_tokens, config.data.history, config.model.fusion.modalities
    carried = answer - 1
    if task.kind == "multilabel":
        carried = sum(answers)
    if config.train.regression_loss and task.kind == "regression":
        carried = sum(answers)
        notes.append(_riding(task, carried, "at most "))
    beside = tokens(after) + config.model.fusion.pseudo_tokens + carried
    if history:
        notes.append(f"task {task.name}: {history} utterances of history, each as long as the mean of the texts")

    def sizes(text_N: np.ndarray, frames: Sequence[np.ndarray]) -> Sizes:
        text_N = text_N if "text" in modalities else np.zeros_like(text_N)
        read_N3 = np.stack([text_N, *frames], 1) * [name in modalities for name in MODALITIES]
        return Sizes(prefix, text_N + beside + round(history * float(text_N.mean())), read_N3)

    if data is not None:
        view = data["train"]
        text_N = np.array([min(tokens(text), most) for text in view.texts()])
        return _Needs(task.name, answer, sizes(text_N, [view.frames("audio"), view.frames("video")]), None, data)
    typical = min(ASSUMED_TEXT, most)
    notes.append(
        f"task {task.name}: texts of {typical} tokens, the longest {most} (data.max_text_tokens); audio and video of "
        f"{ASSUMED_LONGEST} frames of {ASSUMED_WIDTH} features"
    )
    every = np.ones(config.train.global_batch, dtype=np.int64)
    frames = [every * ASSUMED_LONGEST] * 2
    return _Needs(task.name, answer, sizes(every * typical, frames), sizes(every * most, frames), None)


def _stated(needs: _Needs, positions: int, notes: list[str]) -> _Needs:
    """The same with samples of so many positions."""
    own = positions - needs.sizes.prefix
    if own < needs.answer:
        raise ValueError(
            f"--positions={positions} is a sample's whole prompt with its answer, and the instruction of task {needs.task} "
            f"alone has {needs.sizes.prefix}: state more"
        )
    notes.append(
        f"task {needs.task}: samples of {positions} positions, {needs.sizes.prefix} of them the instruction, as stated"
    )
    sizes = replace(needs.sizes, tokens_N=np.full_like(needs.sizes.tokens_N, own))
    return replace(needs, sizes=sizes, extreme=None)


def _data(config: RunConfig, one: RunTask, notes: list[str]) -> PreparedDataset | None:
    task, path = one.task, one.path(config.data.path)
    try:
        data = open_dataset(path, history=config.data.history, choice=fold_choice(config))
        data = data.asking(task.name) if len(data.tasks) > 1 else data
        if len(data["train"]):
            return data
        notes.append(f"task {task.name}: {path} has no training samples")
    except DataError as error:
        has_folds = "folds" in (read_record(Path(path)) or {})
        notes.append(f"task {task.name}: {error if has_folds else f'no prepared dataset {path}'}")
    return None


def _widths(data: PreparedDataset | None) -> dict[str, int]:
    return dict.fromkeys(("audio", "video"), ASSUMED_WIDTH) if data is None else dict(data.widths)
