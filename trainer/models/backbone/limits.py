"""How long rows of a family may be before their values hang on what shares the batch; found at load time.

Two kinds of families have such a limit.

Rotary frequencies of `dynamic` and `longrope` scaling are chosen by the longest position of a whole batch, once that is
beyond the length that the model was first trained on. Up to that length they are constants; beyond it a sample's values
are others beside a long sample than alone, in packed and in padded rows. Source:
`transformers.modeling_rope_utils.dynamic_rope_update`.

A layer's sliding window may be counted in places of the row (GPT-Neo's local layers mask by a table of places) instead
of by the mask that it is given. In a packed row, and behind the padding of a row that holds a tree of answers, places
are farther apart than positions.

Whether a family's windows follow its mask is tried on a twin: the same class and configuration with a window of
`WINDOW` places, few layers (one of each type), few heads and random weights. It takes a fraction of a second whatever
the size of the model, while on the model itself a row would have to be longer than its window, 4,097 tokens for Mistral
7B, at every start. The code that runs is the same: how a window is counted does not depend on its size, nor on weights.
What a twin cannot show, the model's own weights and head, the probe of :mod:`trainer.models.backbone.attention` shows
with six tokens of the model itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.batch import Packing

log = logging.getLogger(__name__)

LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_window", "local_window_size", "local_attention")  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WINDOW, PREFIX, LENGTHS = 4, 5, (3, 9, 6)  # of the twin and its row
LIMIT = 1e-3  # relative, float32


class Rows(Protocol):
    """What is asked of a backbone here (:class:`trainer.models.backbone.causal_lm.Backbone`)."""

    def embed(self, ids: Tensor) -> Tensor: ...
    def packed(self, embeds_TH: Tensor, packing: Packing) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RowLimits:
    """The longest rows of a family; None: any.

    Attributes: `positions`, of a sample with its prefix and answers, in any row; `places`, of a whole packed row, and of a
    padded row with a tree of answers.
    """

    kind: str = ""
    positions: int | None = None
    places: int | None = None

    def check_positions(self, positions: int) -> None:
        """Raises:
        ValueError: the rotary embedding would depend on the batch.
        """
        if self.positions is not None and positions > self.positions:
            raise ValueError(
                f"a sample of {positions} tokens is too long for this model ({self.kind}): beyond {self.positions} tokens its rotary "
                "embedding depends on the longest sample of the batch, and answers would too. Set a smaller data.max_text_tokens "
                "(or fewer turns of history), or use a model whose scaling is yarn, llama3 or linear"
            )

    def check_places(self, places: int, packed: bool) -> None:
        """Raises:
        ValueError: a window would be counted wrongly.
        """
        if self.places is not None and places > self.places:
            way_out = (
                "Set data.layout=padded, or data.max_text_tokens and train.micro_tokens, eval.tokens"
                if packed
                else "Set a smaller data.max_text_tokens, or eval.mode=generate"
            )
            raise ValueError(
                f"a {'packed row' if packed else 'row with its answers'} of {places} tokens is too long for models of type {self.kind!r}: "
                f"their window of {self.places} tokens is counted in places of the row. {way_out}"
            )


def row_limits(model: PreTrainedModel, wrap: Callable[[PreTrainedModel], Rows], trust_remote_code: bool) -> RowLimits:
    """The limits of a model's rows; `wrap` makes a backbone of a twin."""
    config = model.config.get_text_config()
    windows = [getattr(config, name) for name in WINDOWS if isinstance(getattr(config, name, None), int)]
    places = None
    if windows:
        reason = _fault_of_windows(model, wrap, trust_remote_code)
        if reason is not None:
            places = min(windows)
            log.info("rows of at most %d places, the layers' window: %s", places, reason)
    positions = constant_rotary_length(config)
    if positions is not None:
        log.info("samples of at most %d tokens: the rotary embedding of longer ones depends on the batch", positions)
    return RowLimits(config.model_type, positions, places)


def has_experts(config: PretrainedConfig) -> bool:
    """Whether layers are mixtures of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in EXPERTS)


def constant_rotary_length(config: PretrainedConfig) -> int | None:
    """The length up to which rotary frequencies are constants."""
    found = []
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT:
            found.append(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return min(found, default=None)


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """A model's rotary parameters: one set, or one for each type of layers."""
    if isinstance(parameters, dict):
        if any(isinstance(value, dict) for value in parameters.values()):
            for value in parameters.values():
                yield from _ropes(value)
        else:
            yield parameters


def _fault_of_windows(
    model: PreTrainedModel, wrap: Callable[[PreTrainedModel], Rows], trust_remote_code: bool
) -> str | None:
    """What is wrong with packed rows that are longer than the windows of a twin."""
    try:
        twin = _twin(model, trust_remote_code)
        rows = wrap(twin)
        with torch.no_grad():
            ids_T = torch.arange(PREFIX + sum(LENGTHS)) % 32 + 1
            packing = Packing(PREFIX, torch.tensor(LENGTHS), sum(LENGTHS), max(LENGTHS))
            got_TV = rows.logits(rows.packed(rows.embed(ids_T), packing))[PREFIX:]
            alone = [
                twin(input_ids=torch.cat([ids_T[:PREFIX], own])[None], use_cache=False).logits[0, PREFIX:]
                for own in ids_T[PREFIX:].split(LENGTHS)
            ]
        want_TV = torch.cat(alone)
        error_size = float((got_TV - want_TV).norm() / want_TV.norm().clamp_min(1e-6))
    except Exception as error:  # noqa: BLE001  # a twin that cannot be made or run, for whatever reason, shows nothing
        return f"its windows could not be tried ({str(error).strip().partition(chr(10))[0]})"
    return (
        None
        if error_size < LIMIT
        else f"packed rows beyond it differ from the model's own by {error_size:.2g} (relative)"
    )


def _twin(model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """A small random model of the same class and configuration, with windows of `WINDOW` places; random states stay as they are."""
    config: Any = copy.deepcopy(model.config.get_text_config())
    kinds = list(getattr(config, "layer_types", None) or ())
    shown = sorted({kind: place for place, kind in reversed(list(enumerate(kinds)))}.values())
    if kinds:
        config.layer_types = [kinds[place] for place in shown]
    config.num_hidden_layers = len(shown) if kinds else min(config.num_hidden_layers, 2)
    heads = config.num_attention_heads
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_attention_heads = 2 * shared
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = 2
    config.hidden_size = 2 * shared * width
    config.vocab_size, config.initializer_range = 64, 0.1
    for name in ("intermediate_size", "moe_intermediate_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 64)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    for name in WINDOWS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, WINDOW)
    attention = "eager" if model.config._attn_implementation == "eager" else "sdpa"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        twin: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return twin.eval()
