"""Before the first step: the largest batches that the data can ask for, forward, backward and scored, with no effect."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from trainer.config import RunConfig
from trainer.run.assemble import Parts
from trainer.run.distributed import World
from trainer.run.guard import Guard

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)


class MemoryFault(ValueError):
    """A batch needs more memory than the device has."""


def probe(
    engine: DeepSpeedEngine, parts: Parts, config: RunConfig, world: World, guard: Guard, dtype: torch.dtype
) -> None:
    """Pass each task's worst-case micro-batch through a whole step that moves nothing, and score its worst-case batch.

    Every rank calls this. The samples with the longest text, audio and video are padded together, so no later
    micro-batch is larger in any dimension.

    Raises:
        ValueError: it does not fit into memory (with the settings to change), or its loss is no number.
    """
    faults = []
    counters = (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps)
    for name in parts.tasks:
        view, collate = parts.data[name]["train"], parts.collators[name]
        samples = [view[i] for i in view.longest(config.train.micro_batch)]
        batch = collate(samples, weight=1.0, epoch=None).to(world.device, dtype)
        shape = f"{len(samples)} samples of {batch.input_ids_BL.shape[1]} tokens, {batch.audio.mask_BT.shape[1]} audio and {batch.video.mask_BT.shape[1]} video frames"
        with memory_explained(
            f"task {name}: the largest micro-batch ({shape})", "train.micro_batch", config.train.micro_batch
        ):
            engine.set_gradient_accumulation_boundary(True)
            output = engine(batch)
            loss = output.loss_B.mean()
            engine.backward(loss + output.balance_B.mean() + output.idle, scale_wrt_gas=False)
            with guard.still(True):
                engine.step()
        if not math.isfinite(float(loss.detach())):
            ids = ", ".join(sample.id for sample in samples)
            faults.append(
                f"task {name}: the loss is {float(loss.detach())} before any training, on {ids}: see the features, or the backbone and its precision"
            )
        guard.found()
        if parts.model.fusion is not None:
            parts.model.fusion.gate.discard_usage()
        _score(engine, parts, config, name, world, dtype)
    engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps = counters
    if faults:
        raise ValueError("\n".join(faults))


def _score(
    engine: DeepSpeedEngine, parts: Parts, config: RunConfig, name: str, world: World, dtype: torch.dtype
) -> None:
    view, trie = parts.data[name]["valid"], parts.tries[name]
    samples = [view[i] for i in view.longest(config.eval.batch)]
    if not samples or config.eval.mode != "score":
        return
    batch = parts.collators[name](samples, answers=False).to(world.device, dtype)
    shape = f"{len(samples)} samples of {batch.input_ids_BL.shape[1]} tokens, {len(trie.answers)} answers"
    engine.eval()
    with (
        torch.no_grad(),
        memory_explained(f"task {name}: the largest evaluation batch ({shape})", "eval.batch", config.eval.batch),
    ):
        engine(batch, trie.to(world.device))
    engine.train()


@contextlib.contextmanager
def memory_explained(what: str, key: str, value: int) -> Iterator[None]:
    """An out-of-memory error inside the block becomes a message that names the settings to change."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a bare one
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in text and "not enough memory" not in text:
            raise
        smaller = f"{key}={max(1, value // 2)} (now {value}), " if value > 1 else ""
        checkpointing = "" if key == "eval.batch" else "model.backbone.gradient_checkpointing=true, "
        raise MemoryFault(
            f"{what} does not fit into memory: {text.splitlines()[0]}\ntry {smaller}{checkpointing}a smaller data.max_text_tokens, or more GPUs with train.zero=3"
        ) from error
