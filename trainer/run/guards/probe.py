"""Before the first step: the largest batches that the data can ask for, forward, backward and scored, with no effect."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from trainer.batch import Batch, PackedBatch
from trainer.config import RunConfig
from trainer.data.sampling import Limits, MicroBatch, Sizes, largest_micro_batch
from trainer.distributed.world import World
from trainer.run.assemble import RunComponents
from trainer.run.evaluate import Scorer
from trainer.run.guards.guard import Guard
from trainer.run.loss_scale import LossScale

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)


NO_MEMORY = ("alloc", "not enough memory", "could not create a primitive")
"""In the bare RuntimeErrors of exhausted memory: the CPU allocator's, std::bad_alloc, and oneDNN's, which has no better text."""


class MemoryFault(ValueError):
    """A batch needs more memory than the device has."""


def probe(engine: DeepSpeedEngine, parts: RunComponents, config: RunConfig, world: World, guard: Guard) -> None:
    """Pass each task's worst-case micro-batch through a whole step that moves nothing, and answer the worst-case batch of the
    splits that the run evaluates.

    Every rank calls this. Several micro-batches are tried (:func:`largest`) where none needs the most of everything.

    Raises:
        ValueError: it does not fit into memory (with the settings to change), or its loss is not finite.
    """
    faults = []
    counters = (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps)
    train = config.train
    for name in parts.tasks:
        view, collate = parts.data[name]["train"], parts.collators[name]
        limits = Limits.of_training(config, world.device.type)
        sizes = collate.sizes(view)
        tried = largest(sizes, limits, train.global_batch, world.size)
        for _, micro in uncovered([(need_of(micro, sizes, limits), micro) for micro in tried]):
            samples = [view[i] for i in micro.indices]
            batch = collate.training(samples, micro, None).to(world.device)
            what = f"task {name}: the largest micro-batch ({_shape(batch)})"
            with memory_explained(what, "train.micro_tokens", train.micro_tokens, batch.positions):
                engine.set_gradient_accumulation_boundary(True)
                output = engine(batch)
                loss = output.loss_B.mean()
                engine.backward(loss + output.auxiliary_B.mean() + output.unused_param_zero, scale_wrt_gas=False)
                with guard.freeze_optimizer(True), LossScale(engine).preserved():
                    engine.step()
            if not math.isfinite(float(loss.detach())):
                ids = ", ".join(sample.id for sample in samples)
                faults.append(
                    f"task {name}: the loss is {float(loss.detach())} before any training, on {ids}: see the features, or the backbone and its precision"
                )
            guard.found()
            if parts.model.fusion is not None:
                parts.model.fusion.gate.discard_usage()
        _answer(engine, parts, config, name, list(dict.fromkeys(["valid", *config.eval.splits])), world)
    engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps = counters
    if faults:
        raise ValueError("\n".join(faults))


def largest(sizes: Sizes, limits: Limits, most: int, world: int = 1) -> list[MicroBatch]:
    """The micro-batches of a global batch of at most `most` samples over `world` ranks that need most: by prompt, by what the fusion network reads, and the
    longest prompt among the shortest, to whose length attention may pad them."""
    orders = [np.argsort(-need_N, kind="stable") for need_N in (sizes.tokens_N, sizes.read_N3.sum(1))]
    orders.append(np.roll(orders[0][::-1], 1))
    out: list[MicroBatch] = []
    for order in orders:
        if not len(order):
            return []
        first = largest_micro_batch(order[:most].tolist(), sizes, limits, world)
        if first not in out:
            out.append(first)
    return out


SLACK = (
    1 / 64
)  # by which a batch may ask more than one that was tried: two fillings of one limit differ by less than a sample
Need = tuple[int, int, int, int]
T = TypeVar("T")


def need_of(micro: MicroBatch, sizes: Sizes, limits: Limits) -> Need:
    """What a micro-batch asks of memory: samples, positions, the longest prompt, and the places of text, audio and video, with padding, in
    that one of its groups which has most."""
    chosen = list(micro.indices)
    read_n3, stops = sizes.read_N3[chosen], np.cumsum(micro.groups).tolist()
    groups = [read_n3[start:stop] for start, stop in zip([0, *stops], stops, strict=False) if stop > start]
    places = max(len(group_n3) * int(group_n3.max(axis=0).sum()) for group_n3 in groups or [read_n3])
    return len(chosen), sizes.positions(chosen, limits.packed), int(sizes.tokens_N[chosen].max()), places


def uncovered(found: Sequence[tuple[Need, T]]) -> list[tuple[Need, T]]:
    """Those of which each asks more of something than every other: what one batch has room for, a smaller one has."""
    kept: list[tuple[Need, T]] = []
    for need, one in sorted(found, key=lambda pair: pair[0], reverse=True):
        if not any(all(a * (1 + SLACK) >= b for a, b in zip(larger, need, strict=True)) for larger, _ in kept):
            kept.append((need, one))
    return kept


def _shape(batch: Batch | PackedBatch) -> str:
    frames = [(g.audio.mask_BT.shape[1], g.video.mask_BT.shape[1]) for g in batch.inputs]
    audio, video = (max(longest) for longest in zip(*frames, strict=True))
    return f"{len(batch)} samples, {batch.positions} positions, up to {audio} audio and {video} video frames"


def _answer(
    engine: DeepSpeedEngine, parts: RunComponents, config: RunConfig, name: str, splits: Sequence[str], world: World
) -> None:
    """Score, or generate, the largest batches of a task's splits, as an evaluation does."""
    scorer, found = Scorer(engine, parts, config, name, world), []
    for split in splits:
        view = parts.data[name][split]
        sizes = scorer.sizes(view)
        found += [
            (need_of(micro, sizes, scorer.limits), (split, micro)) for micro in largest(sizes, scorer.limits, len(view))
        ]
    engine.eval()
    for (_, positions, *_), (split, micro) in uncovered(found):
        samples = [parts.data[name][split][i] for i in micro.indices]
        shape = f"{len(samples)} samples, {positions} positions, {len(parts.tries[name].answers)} answers"
        what = f"task {name}: the largest evaluation batch of {split} ({shape})"
        with torch.no_grad(), memory_explained(what, "eval.tokens", config.eval.tokens, positions):
            scorer.answer(samples, micro)
    engine.train()


@contextlib.contextmanager
def memory_explained(what: str, key: str, value: int, positions: int | None = None) -> Iterator[None]:
    """An out-of-memory error inside the block becomes a message that names the settings to change.

    `positions` are those of the batch, where they are known: they may be far below the limit `value`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in text for s in NO_MEMORY):
            raise
        smaller = f"{key}={max(1, min(value, positions or value) // 2)} (now {value}), " if value > 1 else ""
        checkpointing = "" if key == "eval.tokens" else "model.backbone.gradient_checkpointing=true, "
        raise MemoryFault(
            f"{what} does not fit into memory: {text.splitlines()[0]}\ntry {smaller}{checkpointing}a smaller data.max_text_tokens, or more GPUs with train.zero=3"
        ) from error
