"""How long a run's rows are and how many steps it takes: from the prepared data where they are, else from stated assumptions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from launch.abstract import Rows
from trainer.config import RunConfig
from trainer.data.collate import prompt_language, prompt_texts
from trainer.data.dataset import PreparedDataset, open_dataset
from trainer.data.faults import DataError
from trainer.data.sampling import Order
from trainer.models.loading import BackboneError, load_tokenizer
from trainer.tasks import Task, get_task
from trainer.text import encode, start_tokens

CHARACTERS_PER_TOKEN = {"en": 4.0, "zh": 1.5}  # where there is no tokenizer
ASSUMED_TEXT = 25  # tokens of a sample's own text, where there are no data
ASSUMED_FRAMES, ASSUMED_LONGEST, ASSUMED_WIDTH = 60, 500, 512
STEPS_LOOKED_AT = 200


@dataclass
class Lengths:
    """What a plan needs to know of the data.

    `longest` is the largest micro-batch of the run, of `task`. `padded_positions` and `micro_steps` (of the rank that has
    most) are means over optimizer steps, `padded_positions` of all ranks together. `assumptions` says, in sentences, what
    was not read from data. What is not known is None.
    """

    task: str
    longest: Rows
    widths: dict[str, dict[str, int]]
    mean_positions: float
    padded_positions: float
    micro_steps: int
    samples: dict[str, int | None]
    steps_per_epoch: int | None
    assumptions: list[str] = field(default_factory=list)


@dataclass
class _TaskLengths:
    task: Task
    tokens_N: np.ndarray | None  # positions of every training row
    mean: float
    longest: Rows
    widths: dict[str, int]
    order_lengths: np.ndarray | None


def run_lengths(config: RunConfig, ranks: int, *, positions: int | None = None, samples: int | None = None) -> Lengths:
    """Look at the run's data.

    Args:
        positions: of a row; stands in place of what the data or the assumptions say.
        samples: training samples of an epoch, where there are no data.
    """
    notes: list[str] = []
    tokenizer = _tokenizer(config, notes)
    every = [_task_lengths(config, get_task(name), tokenizer, positions, notes) for name in config.tasks]
    largest = max(every, key=lambda t: t.longest.rows * t.longest.positions)
    order = None
    if all(t.order_lengths is not None for t in every):
        order = Order(
            {t.task.name: t.order_lengths for t in every if t.order_lengths is not None},
            global_batch=config.train.global_batch,
            seed=config.train.seed,
            weights=config.data.weights,
        )
    steps = None if order is None else order.steps_per_epoch
    if order is None and samples is not None:
        steps = math.ceil(samples / config.train.global_batch)
        notes.append(f"{samples} training samples, as stated")
    mean = float(np.mean([t.mean for t in every]))
    micro_steps = math.ceil(math.ceil(config.train.global_batch / config.train.micro_batch) / ranks)
    padded = mean * config.train.global_batch
    if order is not None and positions is None:
        padded = _padded(order, {t.task.name: t.tokens_N for t in every if t.tokens_N is not None}, config)
    elif positions is None:
        notes.append("rows as long as the mean: padding is not in the positions of a step")
    return Lengths(
        task=largest.task.name,
        longest=largest.longest,
        widths={t.task.name: t.widths for t in every},
        mean_positions=mean,
        padded_positions=padded,
        micro_steps=micro_steps,
        samples={t.task.name: None if t.tokens_N is None else len(t.tokens_N) for t in every},
        steps_per_epoch=steps,
        assumptions=notes,
    )


def _tokenizer(config: RunConfig, notes: list[str]) -> PreTrainedTokenizerBase | None:
    if config.model.backbone.name != "tiny":
        with contextlib.suppress(BackboneError):
            tokenizer = load_tokenizer(config.model.backbone)
            if encode(tokenizer, "a word"):  # from a folder without one, transformers makes one that knows nothing
                return tokenizer
    per = ", ".join(f"{n:g} in {language}" for language, n in CHARACTERS_PER_TOKEN.items())
    notes.append(f"no tokenizer here: characters per token taken as {per}")
    return None


def _task_lengths(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None, positions: int | None, notes: list[str]
) -> _TaskLengths:
    language = prompt_language(task, config.data)

    def tokens(text: str) -> int:
        return (
            math.ceil(len(text) / CHARACTERS_PER_TOKEN[language]) if tokenizer is None else len(encode(tokenizer, text))
        )

    before, after = prompt_texts(task, config.data)
    answer = 1 + max(tokens(text) for text in task.answer_texts(config.data.answers, language))
    frame = (len(start_tokens(tokenizer)) if tokenizer is not None else 1) + tokens(before) + tokens(after)
    frame += config.model.fusion.pseudo_tokens + answer - 1
    data = _data(config, task, notes)
    most = config.data.max_text_tokens
    if data is None:
        text_N, mean_text, longest_text = None, float(min(ASSUMED_TEXT, most)), most
        notes.append(
            f"task {task.name}: texts of {mean_text:g} tokens, the longest {most} (data.max_text_tokens); audio and video of "
            f"up to {ASSUMED_LONGEST} frames of {ASSUMED_WIDTH} features"
        )
    else:
        text_N = np.array([min(tokens(text), most) for text in data["train"].texts()])
        mean_text, longest_text = float(text_N.mean()), int(text_N.max())
    history = config.data.history
    if history:
        notes.append(
            f"task {task.name}: {history} utterances of history, each as long as a text (the mean, and the longest)"
        )
    tokens_N = None if text_N is None else text_N + frame + round(history * mean_text)
    mean, longest = frame + (1 + history) * mean_text, frame + (1 + history) * longest_text
    if positions is not None:
        mean, longest, tokens_N = (
            float(positions),
            positions,
            None if tokens_N is None else np.full_like(tokens_N, positions),
        )
        notes.append(f"task {task.name}: rows of {positions} positions, as stated")
    rows = min(config.train.micro_batch, config.train.global_batch)
    return _TaskLengths(
        task=task,
        tokens_N=tokens_N,
        mean=mean,
        longest=Rows(
            rows if data is None else min(rows, len(data["train"])),
            longest, answer, longest_text, _longest_frames(data, "audio"), _longest_frames(data, "video"),
        ),
        widths=dict.fromkeys(("audio", "video"), ASSUMED_WIDTH) if data is None else dict(data.widths),
        order_lengths=None if data is None else data["train"].lengths(),
    )  # fmt: skip


def _data(config: RunConfig, task: Task, notes: list[str]) -> PreparedDataset | None:
    path = config.data.path.replace("{task}", task.name)
    try:
        data = open_dataset(path, history=config.data.history)
        if len(data["train"]):
            return data
        notes.append(f"task {task.name}: {path} has no training samples")
    except DataError:
        notes.append(f"task {task.name}: no prepared dataset {path}")
    return None


def _longest_frames(data: PreparedDataset | None, name: str) -> int:
    if data is None:
        return ASSUMED_LONGEST
    entry: Mapping[str, Any] = data.record["splits"]["train"][f"{name}_frames"]
    return int(entry["max"] or 1)


def _padded(order: Order, tokens: Mapping[str, np.ndarray], config: RunConfig) -> float:
    """Mean positions of a step, all ranks together, padding included, over the first steps."""
    steps = min(order.steps_per_epoch, STEPS_LOOKED_AT)
    size, total = config.train.micro_batch, 0
    for step in range(steps):
        batch = order.step(step)
        lengths = tokens[batch.task][list(batch.indices)]
        total += sum(
            int(lengths[i : i + size].max()) * len(lengths[i : i + size]) for i in range(0, len(lengths), size)
        )
    return total / steps
