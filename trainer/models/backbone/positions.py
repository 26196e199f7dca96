"""How many positions a model has: from its configuration and its modules without weights, before anything is loaded.

Three kinds of models. Those with a table of positions (GPT-2, OPT, GPT-Neo, BERT learn theirs; GPT-J and CodeGen compute
one of sines) cannot read what lies beyond it. Rotary frequencies that depend on the longest sample of a batch are refused
beyond the length from which they do (:mod:`trainer.models.backbone.limits`). All others compute positions of any length,
and were trained on `max_position_embeddings` of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config import BackboneConfig
from trainer.models.backbone.limits import constant_rotary_length
from trainer.models.backbone.loading import load_shape

log = logging.getLogger(__name__)

CONFIGURED = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
TABLES = ("pos", "wpe")  # in the names of tables of positions
FIXED = ("mpt",)  # types that compute their biases for as many positions as are configured, and no more


@dataclass(frozen=True)
class PositionLimit:
    """A sample may have `positions`, its prompt and its answer together; why, says `kind`.

    `table`: the model has no more; `rotary`: beyond them values depend on the batch; `trained`: it has not seen more.
    """

    positions: int
    kind: Literal["table", "rotary", "trained"]

    @property
    def hard(self) -> bool:
        """Whether longer samples cannot be computed, or not rightly."""
        return self.kind != "trained"

    @property
    def reason(self) -> str:
        return {
            "table": f"its table of positions has {self.positions}",
            "rotary": f"beyond {self.positions} its rotary embedding depends on the longest sample of the batch",
            "trained": f"it was trained on {self.positions}",
        }[self.kind]


def skeleton(config: BackboneConfig, folder: Path | None = None) -> PreTrainedModel | None:
    """The model of a configuration without values, on the `meta` device; None where it cannot be made so, which is explained when
    it is loaded. `folder` is where the tiny backbone was written."""
    try:
        shape = load_shape(config, folder)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # noqa: BLE001  # a folder's faults, or code that it brings along
        log.debug("no model without weights (%s): its positions and layers are seen when it is loaded", error)
        return None
    return model


def position_limit(model: PreTrainedModel | None) -> PositionLimit | None:
    """The limit of a model, which may be a :func:`skeleton`; None: it has none, or names none."""
    if model is None:
        return None
    config = model.config.get_text_config()
    configured = [getattr(config, name, None) for name in CONFIGURED]
    named = [n for n in configured if isinstance(n, int) and n > 0]
    if tables := list(_tables(model.get_decoder(), named)):
        return PositionLimit(min(tables), "table")
    rotary = constant_rotary_length(config)
    if rotary is not None:
        return PositionLimit(rotary, "rotary")
    if not named:
        return None
    return PositionLimit(named[0], "table" if config.model_type in FIXED else "trained")


def _tables(decoder: nn.Module, named: list[int]) -> Iterator[int]:
    """The positions in each table of positions: rows, less those that stand before position 0 (OPT's offset of 2)."""
    for name, module in decoder.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and _names_positions(leaf):
            offset = getattr(module, "offset", 0)
            yield module.num_embeddings - (offset if isinstance(offset, int) else 0)
        for key, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, Tensor) and value.ndim == 2 and _names_positions(key) and value.shape[0] in named:
                yield value.shape[0]


def _names_positions(name: str) -> bool:
    return any(part in name for part in TABLES) and "rel" not in name
