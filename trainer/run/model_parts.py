"""What answers: tokenizer, collators, answer tries and the model of a run, built from its config and what it reads of its tasks.

No dataset is needed here; :mod:`trainer.run.assemble` adds those of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trainer.answer_tree import AnswerTree
from trainer.answers.tree import AnswerError, task_tree
from trainer.batch import AnswerTrie, Standardisation
from trainer.config import FusionConfig, RunConfig
from trainer.data.collate import Collator, prompt_language
from trainer.data.objective import Objective
from trainer.data.task_input import TaskInput
from trainer.distributed.deepspeed_config import deepspeed_config, zero_stage
from trainer.distributed.world import World
from trainer.kernels.gate import resolve_kernel
from trainer.models.backbone.causal_lm import build_backbone, load_tokenizer
from trainer.models.backbone.positions import PositionLimit, position_limit, skeleton
from trainer.models.build import build_model
from trainer.models.egmf import EGMF
from trainer.models.fusion.selection import expert_classes, fitting_experts, kept_modalities
from trainer.tasks import Task
from trainer.text import Joining

log = logging.getLogger(__name__)

BACKBONE = "backbone"  # the offline backbone's folder in the run folder
MakeObjective = Callable[[Task, AnswerTree], Objective]


@dataclass(kw_only=True)
class ModelParts:
    """What answers samples of some tasks; `inputs` is what the model reads of each, `limit` the backbone's positions."""

    tasks: dict[str, Task]
    collators: dict[str, Collator]
    tries: dict[str, AnswerTrie]
    model: EGMF
    inputs: dict[str, TaskInput] = field(default_factory=dict)
    joining: Joining = "running"
    limit: PositionLimit | None = None


@dataclass
class OpenedModel:
    """A trained model that answers. `forward` is the model, or its ZeRO-3 engine where the config and world ask it."""

    config: RunConfig
    parts: ModelParts
    world: World
    forward: Callable[..., Any]


def check_fusion(config: FusionConfig, widths: Mapping[str, Mapping[str, int]], world: World) -> None:
    """Refuse, before the backbone loads, experts that are not there and a gate's kernel that cannot run."""
    if config.pseudo_tokens:
        modalities = kept_modalities(config, widths)
        experts = fitting_experts(expert_classes(config), modalities)
        resolve_kernel(config.gate.kernel, world.device.type, config.width, len(experts) * len(modalities))


def model_parts(
    config: RunConfig,
    inputs: Mapping[str, TaskInput],
    folder: Path,
    world: World,
    dtype: torch.dtype,
    joining: Joining,
    *,
    partition: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelParts:
    """All parts, with the fusion network's weights as initialised: load trained ones. The backbone is whole, unless `partition` is asked for.

    Args:
        folder: holds the tiny backbone, where the config names it.
        joining: how prompts are tokenised (:class:`trainer.text.Pieces`).
        partition: under ZeRO-3 each rank loads its part of the backbone alone, for an engine that is built next.
        tokenizer: in place of the backbone's own.

    Raises:
        ValueError: parts that do not fit each other.
    """
    check_fusion(config.model.fusion, {name: one.widths for name, one in inputs.items()}, world)
    tokenizer = tokenizer or load_tokenizer(config.model.backbone, folder)
    collators, tries = make_collators(config, inputs, tokenizer, joining)
    return ModelParts(
        tasks={name: one.task for name, one in inputs.items()},
        collators=collators,
        tries=tries,
        model=make_model(config, inputs, folder, world, dtype, partition=partition, tokenizer=tokenizer),
        inputs=dict(inputs),
        joining=joining,
        limit=position_limit(skeleton(config.model.backbone, folder)),
    )


def make_model(
    config: RunConfig,
    inputs: Mapping[str, TaskInput],
    folder: Path,
    world: World,
    dtype: torch.dtype,
    *,
    partition: bool = False,
    statistics: Mapping[str, Mapping[str, Standardisation]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EGMF:
    """The backbone and the fusion network, initialised by the run's seed; arguments as of :func:`model_parts`, and `statistics` of the
    features of each task as of :func:`trainer.models.build.build_model`."""
    torch.manual_seed(config.train.seed)
    zero3 = deepspeed_config(config) if partition and zero_stage(config) == 3 else None
    backbone = build_backbone(
        config.model.backbone,
        config.model.adapter,
        dtype,
        world.device,
        folder=folder,
        zero3=zero3,
        ranks=world,
        tokenizer=tokenizer,
    )
    model = build_model(
        config.model.fusion,
        backbone,
        {name: one.widths for name, one in inputs.items()},
        {name: len(one.task.answers(config.data.answers)) for name, one in inputs.items()},
        dtype,
        world.device,
        world,
        statistics,
        [name for name, one in inputs.items() if one.task.kind == "multilabel"],
        {name: one.dataset for name, one in inputs.items() if one.dataset is not None},
    )
    if model.fusion is not None and config.model.fusion.compile:
        if world.device.type == "cpu":
            log.warning(
                "model.fusion.compile=true: on a CPU this takes minutes at the first step, and longer than it saves"
            )
        model.fusion.compile(dynamic=True)
    return model


def make_collators(
    config: RunConfig,
    inputs: Mapping[str, TaskInput],
    tokenizer: PreTrainedTokenizerBase,
    joining: Joining = "running",
    *,
    objective: MakeObjective | None = None,
    datasets: Mapping[str, Path] | None = None,
) -> tuple[dict[str, Collator], dict[str, AnswerTrie]]:
    """Each task's collator, and what its samples carry of the tree of answers to be scored.

    Args:
        objective: the training loss of a task; default: one that only scores.
        datasets: task -> the folder of its prepared dataset, where it has one.

    Raises:
        ValueError: every task with answers that the tokenizer cannot tell apart.
    """
    collators, tries, faults = {}, {}, []
    for name, one in inputs.items():
        task = one.task
        try:
            tree = task_tree(task, tokenizer, config.data.answers, prompt_language(task, config.data), joining)
        except AnswerError as error:
            faults.append(f"task {name}: {error}")
            continue
        tries[name] = tree.trie(config.eval.score)
        collators[name] = Collator(
            task,
            tokenizer,
            config.data,
            widths=one.widths,
            rates=one.rates,
            pseudo_tokens=config.model.fusion.pseudo_tokens,
            modalities=config.model.fusion.modalities,
            seed=config.train.seed,
            objective=Objective(tree=tree, score=config.eval.score) if objective is None else objective(task, tree),
            joining=joining,
            dataset=(datasets or {}).get(name),
        )
        if config.eval.mode == "generate" and (changed := _changed_answers(collators[name], tree.answers)):
            faults.append(
                f"task {name}: the tokenizer does not give {changed} back as written, so that generated answers would never be these: set "
                "eval.mode=score, or rename the labels"
            )
    if faults:
        raise AnswerError("\n".join(faults))
    return collators, tries


def _changed_answers(collate: Collator, answers: Sequence[str]) -> str:
    """The answers that are others when their tokens are decoded (in lower case, with spaces), and what they are then; "" for none."""
    decoded = [str(collate.tokenizer.decode(row[:-1], clean_up_tokenization_spaces=False)) for row in collate.answers]
    changed = [f"{a!r} ({b!r})" for a, b in zip(answers, decoded, strict=True) if a != b.strip()]
    return ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
