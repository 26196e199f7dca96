"""The columns of the throughput benchmark, each with the same three calls: a training step, an evaluation, and a count
of positions.

`ours` is the trainer's own code from collation to optimizer, without DeepSpeed: packed rows, or with
`layout="padded"` a padded row per sample. `Padded` is the baseline of :mod:`benchmarks.padded`. All of them train
LoRA of one rank on all linear layers of the same frozen backbone, and what stands before it, with torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from benchmarks.padded import PaddedData, PaddedModel, answered, build_padded
from benchmarks.shapes import Shape
from trainer.answers.tree import task_tree
from trainer.batch import Batch, PackedBatch, Sample
from trainer.config import AdapterConfig, BackboneConfig, RunConfig
from trainer.data.collate import Collator
from trainer.data.dataset import SplitView
from trainer.data.objective import Objective
from trainer.data.sampling import GlobalBatchSampler, Limits, micro_batches
from trainer.distributed.deepspeed_config import dtype_of
from trainer.distributed.world import World
from trainer.models.backbone.causal_lm import Backbone, build_backbone
from trainer.models.egmf import EGMF
from trainer.models.fusion.network import Fusion
from trainer.models.optimizer_groups import parameter_groups
from trainer.run.assemble import RunComponents
from trainer.run.evaluate import Scorer

COLUMNS = ("ours", "ours padded", "padded")
LORA_RANK, GLOBAL_BATCH, BASELINE_BATCH = 8, 32, 8
LEARNING_RATE = 2e-4


class Contender(Protocol):
    """One column. `positions` counts the positions its backbone has read since it was built, padding included."""

    positions: int

    def step(self, index: int) -> int:
        """One optimizer step, collation included; how many samples it took."""

    def evaluate(self) -> int:
        """Answer every sample once; the number of samples."""


class Counter:
    """Counts the positions that come to a language model's decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        self.positions = 0
        decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor | None]) -> None:
        embeds = kwargs.get("inputs_embeds")
        rows = embeds if embeds is not None else kwargs["input_ids"]
        assert rows is not None
        self.positions += rows.shape[0] * rows.shape[1]


class EgmfContender:
    """EGMF with its default fusion network: three experts, gate, width 256, K = 4."""

    def __init__(
        self, shape: Shape, samples: Sequence[Sample] | SplitView, backbone: Backbone, config: RunConfig
    ) -> None:
        self.samples, self.config, self.task = samples, config, shape.task
        self.world = World(0, 1, next(backbone.parameters()).device)
        self.dtype = dtype_of(config)
        widths = {name: stream[0] for name, stream in shape.streams.items()}
        rates = {name: stream[1] for name, stream in shape.streams.items()}
        H, fusion_config = backbone.hidden_size, config.model.fusion
        answers = {self.task.name: len(self.task.answers(config.data.answers))}
        fusion = Fusion(fusion_config, {self.task.name: widths}, H, H, backbone.embedding_norm, answers)
        self.model = EGMF(backbone, fusion.to(device=self.world.device, dtype=self.dtype))
        tokenizer = backbone.tokenizer
        tree = task_tree(self.task, tokenizer, config.data.answers, self.task.language)
        self.collate = Collator(
            self.task, tokenizer, config.data, widths=widths, rates=rates, pseudo_tokens=fusion_config.pseudo_tokens,
            modalities=fusion_config.modalities, objective=Objective(tree=tree, loss=config.train.loss, score=config.eval.score),
        )  # fmt: skip
        name = self.task.name
        self.parts = RunComponents(
            tasks={name: self.task},
            data={},
            collators={name: self.collate},
            tries={name: tree.trie(config.eval.score)},
            model=self.model,
        )
        self.lengths = samples.lengths() if isinstance(samples, SplitView) else _lengths(samples)
        self.order = GlobalBatchSampler({name: self.lengths}, global_batch=config.train.global_batch, seed=0)
        self.sizes = self.collate.sizes(samples)
        train = config.train
        self.limits = Limits.of_training(config, self.world.device.type)
        groups = parameter_groups(self.model, train.lr.fusion, train.lr.backbone, train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups)
        self.counter = Counter(backbone.base.get_decoder())

    @property
    def positions(self) -> int:
        return self.counter.positions

    def rows(self, index: int) -> Iterator[Batch | PackedBatch]:
        """The micro-batches of a step."""
        batch = self.order.step(index)
        for micro in micro_batches(batch.indices, self.sizes, self.limits, 0, 1):
            rows = self.collate.training([self.samples[i] for i in micro.indices], micro, batch.epoch)
            yield rows.to(self.world.device)

    def step(self, index: int) -> int:
        self.model.train()
        total = len(self.order.step(index).indices)
        for rows in self.rows(index):
            out = self.model(rows)
            (((out.loss_B + out.auxiliary_B) * rows.weight_B).sum() / total + out.unused_param_zero).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.model.fusion is not None
        self.model.fusion.gate.update_usage()
        return total

    @torch.no_grad()
    def evaluate(self) -> int:
        self.model.eval()
        scorer = Scorer(self.model, self.parts, self.config, self.task.name, self.world)
        return sum(
            len(scorer.answer([self.samples[i] for i in micro.indices], micro))
            for micro in scorer.batches(self.samples, self.lengths)
        )


def small(layout: str) -> RunConfig:
    """The config of the columns on CPU: defaults, but float32, LoRA of rank 8 and no dropout in it."""
    config = RunConfig(task="meld")
    config.data.layout = layout  # type: ignore[assignment]
    config.model.adapter = AdapterConfig(rank=LORA_RANK, alpha=2 * LORA_RANK, dropout=0.0)
    config.train.precision = "fp32"
    config.train.global_batch = GLOBAL_BATCH
    return config


def build_egmf(
    shape: Shape, samples: Sequence[Sample] | SplitView, folder: Path, layout: str, config: RunConfig | None = None
) -> EgmfContender:
    """EGMF on the language model in `folder`, with the columns' config or another."""
    config = config or small(layout)
    backbone = build_backbone(BackboneConfig(name=str(folder)), config.model.adapter, torch.float32, "cpu")
    return EgmfContender(shape, samples, backbone, config)


def _lengths(samples: Sequence[Sample]) -> np.ndarray:
    """As :meth:`trainer.data.dataset.SplitView.lengths`."""
    frames = [(sample.audio_TF, sample.video_TF) for sample in samples]
    return np.array(
        [len(s.text) + sum(len(f) for f in both if f is not None) for s, both in zip(samples, frames, strict=True)]
    )


class Padded:
    """The baseline, as published scripts do it: see :mod:`benchmarks.padded`."""

    def __init__(self, shape: Shape, data: PaddedData, model: PaddedModel, global_batch: int = GLOBAL_BATCH) -> None:
        self.shape, self.data, self.model, self.global_batch = shape, data, model, global_batch
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        self.counter = Counter(model.language_model.get_base_model().get_decoder())
        self.order = np.random.default_rng(0).permutation(len(data.answers))

    @property
    def positions(self) -> int:
        return self.counter.positions

    def _cut(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def step(self, index: int) -> int:
        self.model.train()
        rows = np.take(self.order, range(index * self.global_batch, (index + 1) * self.global_batch), mode="wrap")
        for part in self._cut(rows, BASELINE_BATCH):
            (self.model.loss(self.data(part).to(self.device)) * (len(part) / len(rows))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(rows)

    @torch.no_grad()
    def evaluate(self) -> int:
        self.model.eval()
        for part in self._cut(np.arange(len(self.order)), GLOBAL_BATCH):
            tokens = self.model.generate(self.data(part).to(self.device), self.data.longest_answer)
            answered(self.shape, self.data, tokens)
        return len(self.order)


def build(column: str, shape: Shape, samples: Sequence[Sample], folder: Path) -> Contender:
    """The contender of a column; the same random numbers for all."""
    torch.manual_seed(0)
    if column == "padded":
        data = PaddedData(shape, samples, folder)
        return Padded(shape, data, build_padded(shape, data, folder, LORA_RANK))
    return build_egmf(shape, samples, folder, "padded" if column == "ours padded" else "packed")
