"""``egmf export``: a run folder becomes an artefact, which answers without the run and its dataset.

Everything is read from the chosen checkpoint's `model.safetensors`, which has the trained weights whole, whatever ZeRO stage and number of
processes wrote it: no GPU, no model in memory. The folder appears whole, under its name, or not at all.
"""

from __future__ import annotations

import datetime
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.checkpoint.state import CheckpointState, read_state, this_version
from trainer.checkpoint.weights import WEIGHTS
from trainer.config import RunConfig
from trainer.data.collate import prompt_language, prompt_texts
from trainer.data.dataset import PreparedDataset
from trainer.data.task_input import TaskInput, task_inputs
from trainer.distributed.deepspeed_config import dtype_of, zero_stage
from trainer.distributed.world import World
from trainer.files import file_digest
from trainer.models.backbone.loading import load_tokenizer
from trainer.new_folder import FolderKind, new_folder
from trainer.run.assemble import open_data
from trainer.run.model_parts import BACKBONE as TINY
from trainer.run.recipes import check_recipes, saved_recipes
from trainer.run.record import RecordValues, baseline_of, read_record
from trainer.run.saved import chosen_checkpoint
from trainer.saved_config import saved_config
from trainer.serving.artefact import description as names
from trainer.serving.artefact.base import PRECISIONS, check_base, describe_base
from trainer.serving.artefact.card import write_card, write_license
from trainer.serving.artefact.description import (
    ArtefactError,
    Description,
    MergedEntry,
    PromptText,
    RunEntry,
    TaskEntry,
    entries,
    is_artefact,
    write_description,
)
from trainer.serving.artefact.merge import merge
from trainer.serving.artefact.tensors import StoredTensors
from trainer.serving.artefact.weights import (
    check_trained,
    copy_tokenizer,
    trained_backbone,
    write_weights,
    write_whole_backbone,
)
from trainer.text import Pieces, encode

log = logging.getLogger(__name__)

Precision = Literal["bf16", "fp16", "fp32"]
ARTEFACT = FolderKind("an exported model", "exporting", is_artefact, ArtefactError)
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class ExportOptions:
    """What `egmf export` is asked for.

    Attributes:
        merge: also write base and adapter as one model.
        dtype: its type of numbers; None: that of training.
        force: replace an artefact that is there, export a run that has not ended, weights that training has not moved, and what a dataset
            that was prepared anew says.
        data: where the prepared datasets are now, as `data.path` of a config; None: where they were.
        base: where the backbone is now; None: where the run's config says.
    """

    merge: bool = False
    dtype: Precision | None = None
    force: bool = False
    data: str | None = None
    base: str | None = None


def export_run(run: Path, out: Path, options: ExportOptions | None = None) -> Description:
    """Write the artefact of a run to the folder `out`, whole or not at all; its description is returned.

    Of the datasets their records alone are read. Code that the run would bring along does not run.

    Raises:
        ArtefactError: options that do not go together, `out` is taken, weights that no artefact should have, another base, a full disk.
        ValueError: no run folder, no checkpoint, a damaged one, or data that do not fit.
    """
    options = options or ExportOptions()
    config = saved_config(run, [] if options.base is None else [f"model.backbone.name={options.base}"], options.data)
    _check_options(run, out, options, config)
    record = _finished(run, options.force)
    source = _Source.read(run, config, record, options)
    with new_folder(out, ARTEFACT) as folder:
        try:
            written = _write(folder.path, source, options)
            folder.put_in_place()
        except OSError as error:
            raise ArtefactError(
                f"{out} cannot be written: {error.strerror or error}; nothing is left of it: make room, or choose another --out"
            ) from error
    return written


@dataclass(frozen=True)
class _Source:
    """A run, read and found fit to be exported."""

    run: Path
    config: RunConfig
    record: RecordValues
    checkpoint: Path
    state: CheckpointState
    data: dict[str, PreparedDataset]
    inputs: dict[str, TaskInput]

    @classmethod
    def read(cls, run: Path, config: RunConfig, record: RecordValues, options: ExportOptions) -> _Source:
        checkpoint = chosen_checkpoint(run, ALONE)
        state = read_state(checkpoint)
        tasks, data = open_data(config, saved=True)
        changed = [
            name for name, opened in data.items() if state.data.get(name, opened.fingerprint) != opened.fingerprint
        ]
        if changed:
            places = ", ".join(f"{data[name].path} ({name})" for name in changed)
            told = f"{places}: it was prepared anew since the run was trained, so that its widths, rates and recipe may be others than the model's"
            if not options.force:
                raise ArtefactError(
                    f"{told}: name the dataset of the training with --data, or take this one with --force"
                )
            log.warning("--force: %s", told)
        recipes = saved_recipes(run)
        check_recipes(recipes, data, f"the run {run}")
        inputs = task_inputs(tasks, data)
        inputs = {name: replace(one, recipe=recipes.get(name)) for name, one in inputs.items()}
        return cls(run, config, record, checkpoint, state, data, inputs)

    @property
    def folder(self) -> Path:
        """Where the run has its tiny backbone."""
        return self.run / TINY


def _check_options(run: Path, out: Path, options: ExportOptions, config: RunConfig) -> None:
    faults = []
    kind = config.model.adapter.kind
    if options.dtype is not None and not options.merge:
        faults.append("--dtype is the type of the merged backbone: add --merge")
    if options.merge and kind == "full":
        faults.append(
            f"--merge: the run trained the backbone itself, which is exported whole anyway ({names.BACKBONE}/)"
        )
    if options.merge and kind == "frozen":
        faults.append("--merge: the run did not train its backbone, so that there is nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if out.is_dir() and is_artefact(out):
            if not options.force:
                faults.append(f"{out} holds an exported model: --force replaces it, or choose another --out")
        else:
            faults.append(f"{out} exists and is not an exported model, so it is not replaced: choose another --out")
    inner, outer = out.resolve(), run.resolve()
    if inner == outer or inner in outer.parents:
        faults.append(f"{out} is the run's own folder, or holds it: choose another --out")
    if faults:
        raise ArtefactError("\n".join(faults))


def _finished(run: Path, force: bool) -> RecordValues:
    """The run's record; a run that is not done is refused without `force`."""
    record = read_record(run) or RecordValues()
    if baseline_of(record) is not None:
        raise ArtefactError(f"{run} is a baseline, which has no weights: export a run")
    state = record.get("state")
    if state != "done":
        told = f"{run} has not ended (its record says {state or 'nothing'})"
        if not force:
            raise ArtefactError(
                f"{told}: train it to its end, or export with --force the checkpoint that validation has chosen so far"
            )
        log.warning("--force: %s: the checkpoint that validation has chosen so far is exported", told)
    return record


def _write(out: Path, source: _Source, options: ExportOptions) -> Description:
    """Everything but the folder's name."""
    config, model = source.config, source.config.model
    weights = StoredTensors([source.checkpoint / WEIGHTS])
    expected = trained_backbone(model, source.folder)
    doubts = check_trained(weights, expected, model, source.state.step, options.force)
    for doubt in doubts:
        log.warning("--force: %s", doubt)
    base = describe_base(config, source.folder, source.state.base)
    if options.merge or model.backbone.name == "tiny":
        check_base(config, source.folder, source.state.base, source.checkpoint)
    named = None if base.place == "inside" else base.name
    adapter = write_weights(out, weights, model, expected, named)
    if model.adapter.kind == "full":
        write_whole_backbone(out, weights, model, source.folder)
    elif model.backbone.name == "tiny":
        shutil.copytree(source.folder, out / names.BASE, copy_function=shutil.copyfile)  # without its permissions
    (out / names.TOKENIZER).mkdir()
    _write_tokenizer(out / names.TOKENIZER, source)
    merged = None
    if options.merge:
        precision: Precision = options.dtype or PRECISIONS[dtype_of(config)]
        merged = MergedEntry(dtype=precision, dequantised=model.backbone.quantization != "none")
        merge(out, weights, config, source.folder, precision)
    described = Description(
        format=names.FORMAT,
        version=this_version(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=dict(source.record.get("versions") or {}),
        run=_run_entry(source),
        config=_answering_config(source, out),
        joining=source.state.joining,
        tasks={name: _task_entry(one, source) for name, one in source.inputs.items()},
        base=base,
        adapter=adapter,
        merged=merged,
        pseudo_tokens=model.fusion.pseudo_tokens,
        code=_copy_plugins(source, out),
        files={},
    )
    write_card(out, described, source.run, doubts)
    write_license(out, described)
    return write_description(out, described.model_copy(update={"files": entries(out)}))


def _run_entry(source: _Source) -> RunEntry:
    state, record = source.state, source.record
    fold, git, tracked = record.get("fold"), record.get("git"), record.get("mlflow")
    return RunEntry(
        name=source.run.resolve().name,
        seed=source.config.train.seed,
        checkpoint=source.checkpoint.name,
        step=state.step,
        epoch=state.position.epoch,
        steps=record.get("steps"),
        world=state.world,
        zero=state.zero,
        fold=None if fold is None else dict(fold),
        commit=None if git is None else git.get("commit"),
        mlflow_run=state.mlflow_run or (None if tracked is None else tracked.get("run_id")),
    )


def _task_entry(one: TaskInput, source: _Source) -> TaskEntry:
    data, opened = source.config.data, source.data[one.task.name]
    before, after = prompt_texts(one.task, data)
    return TaskEntry(
        definition=one.task.model_dump(mode="json"),
        prompt=PromptText(before=before, after=after),
        answers=list(one.task.answer_texts(data.answers, prompt_language(one.task, data))),
        widths=dict(one.widths),
        rates=dict(one.rates),
        zero_frames=one.zero_frames,
        dataset=one.dataset,
        max_rate=one.max_rate,
        source_rates=dict(one.source_rates),
        recipe=None if one.recipe is None else dict(one.recipe),
        fingerprint=opened.fingerprint,
        samples={split: len(opened[split]) for split in opened.splits},
    )


def _answering_config(source: _Source, out: Path) -> dict[str, Any]:
    """The config without what answering has no use for: where data lay, how the training went on, how it was recorded."""
    config = source.config
    raw = config.model_dump(mode="json")
    for name in ("path", "workers", "fold", "weights"):
        raw["data"].pop(name)
    raw["model"]["fusion"]["plugins"] = [
        f"{names.CODE}/{place}" if file.endswith(".py") else file
        for file, place in _plugin_places(config.model.fusion.plugins).items()
    ]
    return {
        "task": list(source.inputs),
        "data": raw["data"],
        "model": raw["model"],
        "train": {
            "seed": config.train.seed,
            "precision": PRECISIONS[dtype_of(config)],
            "zero": zero_stage(config),
            "loss": config.train.loss,
        },
        "eval": {key: value for key, value in raw["eval"].items() if key not in ("splits", "select")},
    }


def _plugin_places(plugins: list[str]) -> dict[str, str]:
    """A plug-in as the config names it -> its place below `code/`, of which its own name is kept: by that and by its content it is trusted."""
    places: dict[str, str] = {}
    for number, file in enumerate(plugins):
        name = Path(file).name
        places[file] = name if name not in places.values() else f"{number}/{name}"
    return places


def _copy_plugins(source: _Source, out: Path) -> dict[str, str]:
    code: dict[str, str] = {}
    for file, place in _plugin_places(source.config.model.fusion.plugins).items():
        if not file.endswith(".py"):
            log.warning(
                "the plug-in %s is an installed module: whoever opens the exported model must have it too", file
            )
            continue
        if not Path(file).is_file():
            raise ArtefactError(f"the plug-in {file} of the run is gone: the exported model would not work without it")
        target = out / names.CODE / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        code[f"{names.CODE}/{place}"] = file_digest(target)
    return code


def _write_tokenizer(target: Path, source: _Source) -> None:
    """Copy the tokenizer, with the model's configuration, by which some are chosen; and see that it makes the same tokens."""
    backbone = source.config.model.backbone
    copy_tokenizer(source.config.model, source.folder, target)
    own = load_tokenizer(backbone, source.folder)
    if backbone.trust_remote_code:
        return  # its code is read from where the base is
    kept = load_tokenizer(backbone, source.folder, kept=target)
    texts = ["joy", " joy", "</>", "高兴 -0.3", "<|endoftext|>"]
    for one in source.inputs.values():
        texts += [*prompt_texts(one.task, source.config.data), *one.task.answer_texts(source.config.data.answers)]
    same = all(encode(own, text) == encode(kept, text) for text in texts)
    ends = own.eos_token_id == kept.eos_token_id and Pieces(own).marked == Pieces(kept).marked
    if not same or not ends or len(own) != len(kept):
        raise ArtefactError(
            f"the tokenizer of {backbone.name} makes other tokens from a copy of its files: its files are not all that it is made of"
        )
