"""Evaluation: every sample of a split scored once, over all ranks, into one table and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.answers.metrics import compute, scalars
from trainer.answers.prediction_table import (
    PredictionRow,
    SampleAnswer,
    label_shares,
    mean_gates,
    predictions_table,
    sample_answers,
)
from trainer.answers.predictions import parse_answers, predict
from trainer.answers.scores import SplitScores, TaskScores, metric_value
from trainer.batch import Sample
from trainer.config import RunConfig
from trainer.data.dataset import SplitView
from trainer.data.sampling import GROUP_COST, Limits, MicroBatch, Sizes, micro_batches
from trainer.distributed.world import World
from trainer.models.backbone.packed import PrefixCache
from trainer.models.generation import generate
from trainer.models.trie_scores import logits_in_free_memory
from trainer.run.assemble import RunComponents
from trainer.run.lengths import GENERATED_BEYOND
from trainer.run.model_parts import ModelParts

if TYPE_CHECKING:
    import pandas as pd

Change = Callable[[str, Sample], Sample]  # task, sample -> its replacement


@torch.no_grad()
def evaluate(
    forward: Callable[..., Any],
    parts: RunComponents,
    config: RunConfig,
    split: str,
    world: World,
    advance: Callable[[int], None] = lambda n: None,
    before_batch: Callable[[], None] = lambda: None,
    change: Change = lambda task, sample: sample,
) -> tuple[pd.DataFrame, SplitScores]:
    """The predictions of `split`, a row per sample sorted by task and id, and task -> metrics.

    Every rank calls this and gets the same answer; `forward` is the engine or the model in evaluation mode. All ranks
    call `before_batch` equally often: it may hold collectives, and break off by an exception on all of them. `change`
    replaces a sample of a task before it is answered; the replacement may not be longer.
    """
    mine: list[PredictionRow] = []
    for name in parts.tasks:
        mine += _task_rows(forward, parts, config, name, split, world, advance, before_batch, change)
    everyone = world.gather(mine)
    result = None
    if everyone is not None:
        table = predictions_table(row for rows in everyone for row in rows)
        result = table, {name: score_table(parts, table[table["task"] == name], name) for name in parts.tasks}
    result = world.broadcast_object(result)
    assert result is not None
    return result


def score_table(parts: RunComponents, rows: pd.DataFrame, name: str) -> TaskScores:
    """The task's metrics over its rows of a table that :func:`evaluate` makes."""
    valid = rows["valid"].to_numpy(dtype=bool)
    probabilities = None
    if len(rows) and not rows.loc[valid, "probabilities"].isna().any():
        width = parts.tasks[name].probabilities
        probabilities = np.array([p if p is not None else [np.nan] * width for p in rows["probabilities"]])
    task, target_N = parts.tasks[name], rows["target"].to_numpy(float)
    shares = label_shares(task, target_N, rows["shares"])
    return compute(task, target_N, rows["value"].to_numpy(float), probabilities, shares)


def selecting_metrics(parts: RunComponents) -> dict[str, str]:
    """Task -> the metric that chooses a checkpoint."""
    return {name: task.select for name, task in parts.tasks.items()}


def selection_values(parts: RunComponents, metrics: SplitScores) -> dict[str, float | None]:
    """The metric of each task that chooses a checkpoint."""
    return {name: metric_value(metrics[name], task.select) for name, task in parts.tasks.items()}


def flatten_metrics(head: str, metrics: Mapping[str, Mapping[str, object]]) -> dict[str, float | None]:
    """Those of task -> key -> value that are numbers or undefined, under slashed names; with the task's name where there are several."""
    out: dict[str, float | None] = {}
    for task, values in metrics.items():
        middle = f"{task}/" if len(metrics) > 1 else ""
        out |= {f"{head}/{middle}{key}": value for key, value in scalars(values).items()}
    return out


def format_selection_metrics(split: str, parts: RunComponents, metrics: SplitScores) -> str:
    """The selecting metrics in words, for the log."""
    words = []
    for name, task in parts.tasks.items():
        value = metric_value(metrics[name], task.select)
        words.append(f"{name} {split} {task.select} {'undefined' if value is None else f'{value:.4f}'}")
    return ", ".join(words)


class Scorer:
    """Answers samples of one task: plans their batches, keeps the prefix's keys and values, scores or generates.

    Every rank makes one, and calls :meth:`batches` and :meth:`answer` equally often; weights must not change meanwhile.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        parts: ModelParts,
        config: RunConfig,
        name: str,
        world: World,
    ) -> None:
        self.forward, self.parts, self.config, self.world = forward, parts, config, world
        self.task, self.collate = parts.tasks[name], parts.collators[name]
        self.trie = parts.tries[name].to(world.device)
        packed = config.data.layout == "packed" and config.eval.mode == "score"
        cost = GROUP_COST[world.device.type]
        self.limits = Limits(config.eval.tokens, config.eval.batch, packed, group_cost=cost)
        parts.model.backbone.scored_logits = logits_in_free_memory(parts.model.backbone, world)
        self._prefix: PrefixCache | None = None

    def sizes(self, samples: SplitView | Sequence[Sample]) -> Sizes:
        return self.collate.sizes(samples, nodes=len(self.trie.token_N), cached=self.limits.packed)

    def batches(self, samples: SplitView | Sequence[Sample], lengths: np.ndarray) -> Iterator[MicroBatch]:
        """This rank's batches of `samples`, like lengths together; the same number on every rank."""
        order = np.argsort(-lengths, kind="stable").tolist()
        if order:
            yield from micro_batches(order, self.sizes(samples), self.limits, self.world.rank, self.world.size)

    def answer(
        self, samples: Sequence[Sample], micro: MicroBatch, *, pseudo_tokens: bool = False
    ) -> list[SampleAnswer]:
        """The answer to each sample of a batch; `pseudo_tokens`: with these embeddings, as they enter the backbone."""
        if self.config.eval.mode == "generate":
            batch = self.collate(samples, answers=False, weight=micro.weight).to(self.world.device)
            longest = max(map(len, self.collate.answers))
            if self.config.eval.generation == "constrained":
                texts = generate(self.parts.model, batch, longest, self.collate.objective.tree)
            else:
                texts = generate(self.parts.model, batch, longest + GENERATED_BEYOND)
            return sample_answers(self.task, parse_answers(self.task, texts, self.config.data.answers))
        output = self._output(samples, micro)
        predictions = predict(self.task, output.logprob_BC, self.config.data.answers, self.config.eval.prediction)
        gates = mean_gates(output.gate_expert_BKE, output.gate_modality_BKEM)
        pseudo_BKH = output.pseudo_BKH if pseudo_tokens else None
        return sample_answers(
            self.task, predictions, gates, None if pseudo_BKH is None else pseudo_BKH.float().cpu().numpy()
        )

    def _output(self, samples: Sequence[Sample], micro: MicroBatch) -> Any:
        device = self.world.device
        if not self.limits.packed:
            batch = self.collate(samples, answers=False, weight=micro.weight).to(device)
            batch.most_samples = micro.most_samples
            return self.forward(batch, self.trie)
        row = self.collate.pack(samples, micro.groups, trie=self.parts.tries[self.task.name], weight=micro.weight)
        row = row.to(device)
        row.most_samples = micro.most_samples
        if self._prefix is None:
            self._prefix = self.parts.model.prefix(row.prefix_ids_P)
        return self.forward(row, None, self._prefix)


def _task_rows(
    forward: Callable[..., Any],
    parts: RunComponents,
    config: RunConfig,
    name: str,
    split: str,
    world: World,
    advance: Callable[[int], None],
    before_batch: Callable[[], None],
    change: Change,
) -> list[PredictionRow]:
    view, task = parts.data[name][split], parts.tasks[name]
    scorer = Scorer(forward, parts, config, name, world)
    rows: list[PredictionRow] = []
    for micro in scorer.batches(view, view.lengths()):
        before_batch()
        samples = [change(name, view[i]) for i in micro.indices]
        answers = scorer.answer(samples, micro)
        if micro.weight:
            rows += [PredictionRow.of(task, sample, answer) for sample, answer in zip(samples, answers, strict=True)]
            advance(len(samples))
    return rows
