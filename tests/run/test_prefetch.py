"""Batches made ahead by other processes are the batches made on the spot."""

from __future__ import annotations

import os
import signal
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.toy import prepare_toy
from trainer.config import BackboneConfig, DataConfig, TinyConfig
from trainer.data.collate import Collator
from trainer.data.dataset import open_dataset
from trainer.data.sampling import GlobalBatch, GlobalBatchSampler, Limits, MicroBatch, micro_batches
from trainer.models.backbone.causal_lm import build_tiny, load_tokenizer
from trainer.run.prefetch import BatchPrefetcher, Samples
from trainer.tasks import get_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, Any]:
    folder = tmp_path_factory.mktemp("feed")
    view = open_dataset(prepare_toy("meld", folder), history=1)["train"]
    build_tiny(TinyConfig(vocab_size=400), list(view.texts()), folder / "tiny")
    tokenizer = load_tokenizer(BackboneConfig(), folder / "tiny")
    config = DataConfig(modality_dropout=0.3, history=1)
    collate = Collator(
        get_task("meld"), tokenizer, config,
        widths=view.widths, rates=view.rates, pseudo_tokens=4, modalities=("text", "audio", "video"),
    )  # fmt: skip
    order, sizes = GlobalBatchSampler({"meld": view.lengths()}, global_batch=16, seed=0), collate.sizes(view)

    def plan(step: int) -> tuple[GlobalBatch, list[MicroBatch]]:
        batch = order.step(step)
        return batch, micro_batches(batch.indices, sizes, Limits(200), 0, 2)

    return Samples({"meld": view}, {"meld": collate}), plan


def leaves(value: Any) -> list[Any]:
    if is_dataclass(value):
        return [leaf for f in fields(value) for leaf in leaves(getattr(value, f.name))]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_workers_make_the_same_batches_and_end(made: tuple[Samples, Any]) -> None:
    samples, plan = made
    here, ahead = BatchPrefetcher(samples), BatchPrefetcher(samples)
    ahead.work_ahead(2, plan, 7)
    for step in (0, 1, 2, 5, 6):
        if step == 5:  # a jump: a run that is continued, with another number of workers
            ahead.work_ahead(1, plan, 7)
        expected, got = list(here.step(step, *plan(step))), list(ahead.step(step, *plan(step)))
        assert len(expected) == len(plan(step)[1]) > 0
        assert_same(expected, got)
        if step == 0:
            children = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
            assert len(children) >= 2
            for child in children:  # a stop signal to the whole group does not take the batches away
                os.kill(child.pid, signal.SIGTERM)
    ahead.close()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert np.all([b.weight_B.min() >= 0 for b in expected])
