"""An artefact opened: checked byte by byte, then built as the run was, with its trained weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint.state import differs_from_base
from trainer.checkpoint.weights import load_trainable_state
from trainer.config import BackboneConfig, RunConfig
from trainer.data.collate import prompt_language, prompt_texts
from trainer.data.task_input import TaskInput
from trainer.distributed.deepspeed_config import DTYPES, dtype_of, zero_stage
from trainer.distributed.world import World
from trainer.features.recipe_record import RecipeRecord
from trainer.models.backbone.fingerprint import BaseFingerprint
from trainer.models.backbone.loading import load_tokenizer
from trainer.run.model_parts import OpenedModel, model_parts
from trainer.serving.artefact.base import other_base, streamed_fingerprint
from trainer.serving.artefact.config import opened_config
from trainer.serving.artefact.description import (
    BASE,
    DESCRIPTION,
    TOKENIZER,
    ArtefactError,
    Description,
    check_files,
    read_description,
)
from trainer.serving.artefact.weights import trained_state
from trainer.tasks import TaskError, define_task
from trainer.trust import check_trust

log = logging.getLogger(__name__)


def open_artefact(folder: Path, world: World, overrides: Sequence[str] = (), agreed: str | None = None) -> OpenedModel:
    """The model of an artefact, ready to answer: the same bits as the run's that it was exported from.

    Every rank calls this; rank 0 reads all files of the folder, about a second per gigabyte, before anything is used.

    Args:
        overrides: ``dotted.key=value`` words; ``model.backbone.name=PATH`` says where the base is now, and is checked by its hash.
            Another ``train.precision`` or ``model.backbone.quantization`` holds the same base in another way.
        agreed: the hash of code that the folder brings along, see :func:`trainer.trust.check_trust`.

    Raises:
        UntrustedCodeError: the artefact would run code that its user has not agreed to.
        ArtefactError: no artefact, one of another format, a file that has changed, a base that is gone or another, or tasks that this version
            would ask in other words.
        ValueError: overrides that make no config.
    """
    description = read_description(folder)
    with world.on_rank_zero() as first:
        notes = check_files(folder, description) if first else []
    for note in notes:
        log.warning("%s", note)
    config = opened_config(folder, description, overrides)
    check_trust(folder, config, agreed)
    inputs = task_inputs(description, config)
    _check_place(description, config)
    partition = world.size > 1
    kept = None if config.model.backbone.trust_remote_code else folder / TOKENIZER
    parts = model_parts(
        config,
        inputs,
        folder / BASE,
        world,
        dtype_of(config),
        description.joining,
        partition=partition,
        tokenizer=load_tokenizer(config.model.backbone, folder / BASE, kept=kept),
    )
    _check_base(description, config, folder, parts.model.backbone.fingerprints)
    load_trainable_state(parts.model, trained_state(folder, description.adapter.kind))
    forward: Callable[..., Any] = parts.model.eval()
    if zero_stage(config) == 3 and partition:
        from trainer.run.engine import build_inference_engine  # of DeepSpeed, which is imported where it is needed

        engine = build_inference_engine(parts.model, config)
        engine.eval()  # gives nothing back, unlike a module's
        forward = engine
    return OpenedModel(config, parts, world, forward)


def task_inputs(description: Description, config: RunConfig) -> dict[str, TaskInput]:
    """Task -> what the model reads of it.

    Raises:
        ArtefactError: a definition that this version does not take, or would ask in other words than the model was trained with.
    """
    inputs, faults = {}, []
    for name, entry in description.tasks.items():
        try:
            task = define_task(entry.definition, where=f"task {name} in {DESCRIPTION}", saved=True)
        except TaskError as error:
            faults.append(str(error))
            continue
        inputs[name] = TaskInput(
            task,
            entry.widths,
            entry.rates,
            entry.zero_frames,
            entry.dataset,
            entry.max_rate,
            entry.source_rates,
            None if entry.recipe is None else cast(RecipeRecord, entry.recipe),
        )
        if _as_trained(description, config):
            before, after = prompt_texts(task, config.data)
            answers = list(task.answer_texts(config.data.answers, prompt_language(task, config.data)))
            if (before, after, answers) != (entry.prompt.before, entry.prompt.after, entry.answers):
                faults.append(
                    f"task {name}: this version of egmf-trainer asks it in other words than the model was trained with: use version "
                    f"{description.version}"
                )
    if faults:
        raise ArtefactError("\n".join(faults))
    return inputs


def _as_trained(description: Description, config: RunConfig) -> bool:
    """Whether prompts are asked for as in training."""
    written = description.config.get("data", {})
    return all(getattr(config.data, key) == written.get(key) for key in ("prompt_language", "answers"))


def _check_place(description: Description, config: RunConfig) -> None:
    """Refuse a base in a folder that is not there, with what to do."""
    name, base = config.model.backbone.name, description.base
    if base.place == "folder" and name == base.name and not Path(name).expanduser().is_dir():
        raise ArtefactError(
            f"the base of the adapter was the folder {name}, which is not here: say where it is now with model.backbone.name=PATH; it is "
            f"checked by its hash ({base.hash})"
        )


def _check_base(description: Description, config: RunConfig, folder: Path, found: BaseFingerprint) -> None:
    """Refuse another base than that of the training, held as in training or in another way."""
    if description.adapter.kind == "full":
        return
    base, backbone = description.base, config.model.backbone
    held = {"quantization": base.quantization, "double_quantization": base.double_quantization}
    doubly = base.quantization == "nf4" and base.double_quantization
    if _held(backbone) != held or dtype_of(config) is not DTYPES[base.precision]:
        trained = backbone.model_copy(update=held)
        read = streamed_fingerprint(trained, DTYPES[base.precision], folder / BASE)
        if read is None:
            raise ArtefactError(
                f"whether {backbone.name} is the base of the adapter cannot be told in another precision or quantisation than training's, since "
                "models of its family have other tensors in their files than in memory: leave train.precision and "
                "model.backbone.quantization as they are"
            )
        found = read
    if differs_from_base(base.hash, found, doubly, folder):
        raise ArtefactError(other_base(backbone.name, base.hash, found))


def _held(backbone: BackboneConfig) -> dict[str, object]:
    return {"quantization": backbone.quantization, "double_quantization": backbone.double_quantization}
