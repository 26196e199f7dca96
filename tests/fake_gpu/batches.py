"""Batches for the fake device."""

from __future__ import annotations

from typing import TypeVar

import torch

from trainer.batch import AnswerTrie, Batch, PackedBatch, _map

Carried = TypeVar("Carried", Batch, PackedBatch, AnswerTrie)


def on_host(batch: Carried) -> Carried:
    """A collated batch as fake tensors of the host, as if pinned; inside fake tensors."""
    return _map(batch, lambda t: torch.empty(t.shape, dtype=t.dtype))
