"""From a config to the parts of a run: datasets, tokenizer, model, collators, answer tries. For training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from trainer.answer_tree import AnswerTree
from trainer.batch import AnswerTrie
from trainer.config import RunConfig
from trainer.data.collate import Collator, prompt_language, prompt_texts
from trainer.data.dataset import PreparedDataset, SplitView, open_dataset
from trainer.data.folds import FoldRecord, fold_choice
from trainer.data.imbalance import answer_indices, class_weights
from trainer.data.objective import Objective
from trainer.data.task_input import TaskInput, task_inputs
from trainer.distributed.world import World
from trainer.metric_table import FAMILIES
from trainer.models.backbone.adapter import check_targets
from trainer.models.backbone.causal_lm import build_tiny, load_tokenizer
from trainer.models.backbone.positions import position_limit, skeleton
from trainer.questions import RunTask, find_run_tasks, tasks_of_run
from trainer.run.lengths import SplitLengths, check_positions, log_lines, measure_splits, splits_of_run
from trainer.run.model_parts import BACKBONE, ModelParts, check_fusion, make_collators, make_model
from trainer.tasks import Task, select_by
from trainer.text import Joining, Pieces

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunComponents(ModelParts):
    """What a run is made of; `lengths` are those of the splits that a training reads."""

    data: dict[str, PreparedDataset]
    lengths: list[SplitLengths] = field(default_factory=list)

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: data.fingerprint for name, data in self.data.items()}

    @property
    def fold(self) -> FoldRecord | None:
        """The fold that is tested, and how many samples of all tasks are trained on and tested; None without folds."""
        first = next(iter(self.data.values()))
        if first.fold is None:
            return None
        train, test = (sum(len(data[split]) for data in self.data.values()) for split in ("train", "test"))
        return {"name": first.fold, "names": first.folds, "train": train, "test": test}


def open_data(config: RunConfig, *, saved: bool = False) -> tuple[dict[str, Task], dict[str, PreparedDataset]]:
    """The run's tasks, which select by what `eval.select` says, and their prepared datasets.

    `saved`: of a run that was already trained; see :func:`trainer.tasks.define_task`.

    Raises:
        ValueError: every task that is unknown and every dataset that is absent or belongs to another task.
    """
    tasks: dict[str, Task] = {}
    data: dict[str, PreparedDataset] = {}
    opened_at: dict[str, PreparedDataset] = {}
    asked, faults = find_run_tasks(config.tasks, saved=saved)
    for one in asked:
        path = one.path(config.data.path)
        try:
            prompt_language(one.task, config.data)
            if path not in opened_at:
                opened_at[path] = open_dataset(path, history=config.data.history, choice=fold_choice(config))
        except ValueError as error:
            faults += [str(error)] if str(error) not in faults else []
            continue
        tasks[one.task.name] = one.task
        if unfit := _unfit(one, path, opened_at[path]):
            faults += unfit
        else:
            data[one.task.name] = opened_at[path].asking(one.task.name)
    for path, opened in opened_at.items():
        if opened.folds and config.data.fold is None:
            faults.append(
                f"{path} has folds ({', '.join(opened.folds)}) and no splits: choose the fold that is tested, such as "
                f"data.fold={opened.folds[0]}; egmf sweep CONFIG --folds trains one run for each"
            )
    wanted = config.data.max_rate
    faults += [
        f"data.max_rate={wanted:g}, but {path} was prepared with {'no max_rate' if opened.max_rate is None else f'{opened.max_rate:g}'}: "
        f"prepare it with --max-rate {wanted:g}"
        for path, opened in opened_at.items()
        if wanted is not None and opened.max_rate != wanted
    ]
    one_task = [opened for opened in opened_at.values() if len(opened.tasks) == 1]
    if len(tasks) > 1 and "{task}" not in config.data.path and one_task:
        faults.append(f"data.path={config.data.path!r} is one folder for {len(tasks)} tasks: write {{task}} in it")
    faults += [
        f"no sample of {split} answers the question {name}, with the fold {opened.fold} as test: choose another data.fold_valid"
        for name, opened in data.items()
        if opened.fold is not None
        for split in opened.splits
        if not len(opened[split])
    ]
    if len({tuple(opened.folds) for opened in opened_at.values()}) > 1:
        listed = "; ".join(f"{opened.name}: {', '.join(opened.folds) or 'none'}" for opened in opened_at.values())
        faults.append(f"the datasets of one run must have the same folds: {listed}")
    faults += _one_class_settings(config, tasks)
    if config.train.regression_loss and tasks and all(task.kind != "regression" for task in tasks.values()):
        faults.append(
            f"train.regression_loss={config.train.regression_loss:g} is for tasks that answer with numbers, and none of "
            f"{', '.join(tasks)} does: set it to 0"
        )
    if faults:
        raise ValueError("\n".join(faults))
    return select_by(tasks, config.eval.select), data


def _unfit(one: RunTask, path: str, opened: PreparedDataset) -> list[str]:
    """In what a dataset was prepared for another task than the run's."""
    task = one.task
    if len(opened.tasks) > 1 and task.name not in opened.tasks:
        return [
            f"{path} was prepared for the questions {', '.join(opened.tasks)}; {task.name} of {one.requested} is none of them"
        ]
    prepared = opened.tasks[task.name] if len(opened.tasks) > 1 else opened.task
    return [
        f"{path} was prepared for another task: its {key} is {getattr(prepared, key)!r}, that of {one.requested} is "
        f"{getattr(task, key)!r}"
        for key in ("name", "kind", "labels", "grid")
        if getattr(prepared, key) != getattr(task, key)
    ]


def _one_class_settings(config: RunConfig, tasks: Mapping[str, Task]) -> list[str]:
    """Settings that need one answer a sample, of a run with tasks whose samples have several labels."""
    several = [name for name, task in tasks.items() if task.kind == "multilabel"]
    settings = []
    if several and config.train.class_weights != "none":
        settings.append(f"train.class_weights={config.train.class_weights} (set it to none)")
    if several and config.data.sampling != "natural":
        settings.append(f"data.sampling={config.data.sampling} (set it to natural)")
    if several and config.eval.mode == "generate":
        settings.append("eval.mode=generate (set it to score, which asks for every label)")
    return [f"{setting} is for one answer a sample; {', '.join(several)} has several labels" for setting in settings]


def older_selecting_metrics(config: RunConfig) -> dict[str, str]:
    """Task -> the metric that versions before `eval.select` and the family `regression` chose the checkpoint by."""
    older = FAMILIES["mosei"]
    tasks = [one.task for one in tasks_of_run(config.tasks, saved=True)]
    return {
        task.name: older.select if task.family == "regression" and task.select not in older.names else task.select
        for task in tasks
    }


def warn_of_raw_features(config: RunConfig, data: Mapping[str, PreparedDataset]) -> None:
    """Say which datasets have no statistics of their features, although the config asks for standardised ones."""
    fusion = config.model.fusion
    for name, opened in data.items():
        if fusion.pseudo_tokens and fusion.standardise and any(opened.widths.values()) and not opened.measured:
            log.warning(
                "task %s: features are not standardised, since an earlier version prepared %s: prepare it again for new runs",
                name, opened.path,
            )  # fmt: skip


def assemble(
    config: RunConfig,
    out: Path,
    world: World,
    dtype: torch.dtype,
    *,
    partition: bool = False,
    saved: bool = False,
    joining: Joining = "running",
) -> RunComponents:
    """Build all parts; the same on every rank (module initialisation is seeded by the run's seed).

    `partition`: under ZeRO-3 each rank loads its part of the backbone alone, for an engine that is built next. Else the
    backbone is whole. `saved`: as for :func:`open_data`. `joining`: how prompts are tokenised (:class:`trainer.text.Pieces`).

    Raises:
        ValueError: parts that do not fit each other. What tokens and the model's configuration tell (answers that are the
            same, samples longer than the model's positions, layers for LoRA that there are not) is refused before weights are read.
    """
    tasks, data = open_data(config, saved=saved)
    inputs = task_inputs(tasks, data)
    check_fusion(config.model.fusion, {name: one.widths for name, one in inputs.items()}, world)
    folder = out / BACKBONE
    if config.model.backbone.name == "tiny":
        with world.on_rank_zero() as first:
            if first and not folder.exists():
                build_tiny(config.model.backbone.tiny, tiny_texts(config, tasks, data), folder)
    tokenizer = load_tokenizer(config.model.backbone, folder)
    collators, tries = make_run_collators(config, inputs, data, tokenizer, joining)
    if joining == "apart" and Pieces(tokenizer).marked and world.is_rank_zero:
        log.warning(
            "an earlier version began this run, and tokenised the pieces of its prompts apart, each with this tokenizer's mark of a text's "
            "beginning: that is kept; a run that is trained anew reads prompts as running text"
        )
    shape_only = skeleton(config.model.backbone, folder)
    if shape_only is not None:
        check_targets(shape_only, config.model.adapter)
    limit = position_limit(shape_only)
    lengths = [] if saved else measure_splits(config, data, collators, tries, splits_of_run(config), limit)
    warnings = check_positions(lengths, limit, config)
    if world.is_rank_zero:
        for warning in [*warnings, *log_lines(lengths, config)]:
            log.warning("%s", warning)
    statistics = {name: opened.standardisation for name, opened in data.items()}
    model = make_model(config, inputs, folder, world, dtype, partition=partition, statistics=statistics)
    return RunComponents(
        tasks=tasks,
        data=data,
        collators=collators,
        tries=tries,
        model=model,
        inputs=inputs,
        joining=joining,
        limit=limit,
        lengths=lengths,
    )


def make_run_collators(
    config: RunConfig,
    inputs: Mapping[str, TaskInput],
    data: Mapping[str, PreparedDataset],
    tokenizer: PreTrainedTokenizerBase,
    joining: Joining = "running",
) -> tuple[dict[str, Collator], dict[str, AnswerTrie]]:
    """As :func:`trainer.run.model_parts.make_collators`, with the training loss of every task."""
    return make_collators(
        config,
        inputs,
        tokenizer,
        joining,
        objective=lambda task, tree: make_objective(config, task, tree, data[task.name]["train"]),
        datasets={name: opened.path for name, opened in data.items()},
    )


def make_objective(config: RunConfig, task: Task, tree: AnswerTree, samples: SplitView) -> Objective:
    """The training loss of `task` with these training samples."""
    train = config.train
    weight_C = None
    if train.class_weights != "none":
        class_N = answer_indices(task, samples.targets())
        weight_C = class_weights(class_N, len(tree.answers), train.class_weights, train.class_weight_beta)
    error_weight = train.regression_loss if task.kind == "regression" else 0.0
    shared = task.kind == "multilabel" or samples.shared
    return Objective(weight_C, train.label_smoothing, error_weight, tree, shared, train.loss, config.eval.score)


def tiny_texts(config: RunConfig, tasks: dict[str, Task], data: dict[str, PreparedDataset]) -> list[str]:
    """What the offline tokenizer is trained on: prompts, answers and training texts of the run's tasks."""
    texts: list[str] = []
    for name, task in tasks.items():
        split = data[name]["train"]
        texts += split.texts()
        texts += [*prompt_texts(task, config.data), *task.answer_texts(config.data.answers)] * max(1, len(split) // 4)
    return texts
