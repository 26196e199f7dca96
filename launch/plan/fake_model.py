"""The model of a run without its weights: shapes only, built in seconds on any machine.

Everything here happens on PyTorch's fake tensors (meta tensors that remember a device), so that a 72B model costs no memory.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.batch import Standardisation
from trainer.config import RunConfig
from trainer.models.backbone.causal_lm import adapted_backbone
from trainer.models.backbone.packed import MASKED, install
from trainer.models.backbone.quantization import BLOCK
from trainer.models.build import build_model
from trainer.models.egmf import EGMF

NESTED_BLOCK = 256  # scales that share one scale, with double quantisation


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside the block tensors have shapes and no contents."""
    noisy = [logging.getLogger(name) for name in ("trainer.models.fusion.network", "bitsandbytes")]
    levels = [log.level for log in noisy]
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in noisy:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(noisy, levels, strict=True):
                log.setLevel(level)


def build_fake_model(
    config: RunConfig,
    shape: PretrainedConfig,
    widths: Mapping[str, Mapping[str, int]],
    dtype: torch.dtype,
    *,
    answers: Mapping[str, int] | None = None,
    shared: Mapping[str, str] | None = None,
    layers: int | None = None,
    checkpointing: bool = False,
) -> EGMF:
    """The run's model inside :func:`fake_tensors`.

    Args:
        shape: the backbone's configuration.
        widths: task -> features per frame of audio and video.
        answers: task -> number of its answers; needed where the config asks for expert heads.
        shared: task -> the name of the encoders that it shares with others.
        layers: of the backbone; default all.
    """
    shape = copy.deepcopy(shape) if layers is None else _with_layers(shape, layers)
    changes = {"gradient_checkpointing": checkpointing, "reentrant": False}
    backbone_config = config.model.backbone.model_copy(update=changes)
    with unset_fake_temporarily(), torch.device("meta"):  # modules are made here: libraries know meta tensors
        eager = {"attn_implementation": "eager"} if backbone_config.attention == "eager" else {}
        base = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, trust_remote_code=backbone_config.trust_remote_code, **eager
        )
        attention = _attention(base, backbone_config.attention)
        if backbone_config.quantization == "nf4":
            _quantise(base, dtype, backbone_config.double_quantization)
        tokenizer: Any = SimpleNamespace(eos_token_id=0, name_or_path=backbone_config.name)
        backbone = adapted_backbone(base, tokenizer, attention, backbone_config, config.model.adapter, dtype)
        backbone.embedding_norm = 1.0
        device, statistics = torch.device("meta"), {task: _any_statistics(of) for task, of in widths.items()}
        model = build_model(
            config.model.fusion, backbone, widths, answers, dtype, device, statistics=statistics, shared=shared
        )
    to_fake(model)
    model.train()
    return model


def _any_statistics(widths: Mapping[str, int]) -> dict[str, Standardisation]:
    """Of features that are standardised; their values do not matter."""
    return {m: Standardisation(np.zeros(n), np.ones(n), 1.0) for m, n in widths.items() if n}


def _attention(base: PreTrainedModel, asked: str) -> str:
    """The attention backend that is recorded: as asked the mask of a whole row, else blocks, which hold the most of what `auto`
    may choose on a GPU, where the family can."""
    own = str(base.config._attn_implementation)
    if own == "sdpa" and base._supports_attention_backend:
        install(base)
        return asked if asked in MASKED else "blocks"
    return own


def to_fake(model: nn.Module, device: str = "cpu") -> None:
    """Give every tensor of a model a fake one on `device` instead; a weight shared by two modules stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            new: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                for part in (state, state.state2):
                    for key, value in vars(part).items() if part is not None else ():
                        if isinstance(value, Tensor):
                            setattr(part, key, torch.empty(value.shape, dtype=value.dtype, device=device))
                new.quant_state = state
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None:
                    place[name] = fake(tensor)


def _with_layers(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = layers
    kinds = getattr(shape, "layer_types", None)
    if kinds:
        shape.layer_types = list(kinds)[:layers]
    return shape


def _quantise(model: nn.Module, dtype: torch.dtype, double: bool) -> None:
    """Put bitsandbytes' layers, as they are after loading, in the place of all linear layers but the head."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        blocks = -(-layer.weight.numel() // BLOCK)
        outer = None
        if double:
            outer = QuantState(
                torch.empty(-(-blocks // NESTED_BLOCK)),
                blocksize=NESTED_BLOCK,
                code=torch.empty(256),
                dtype=torch.float32,
            )
        state = QuantState(
            torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
            shape=layer.weight.shape,
            code=torch.empty(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()) if double else None,
            state2=outer,
        )
        new = Linear4bit(layer.in_features, layer.out_features, False, dtype, double, "nf4", torch.uint8)
        packed = torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        new.weight = Params4bit(
            packed, quant_state=state, compress_statistics=double, quant_type="nf4", bnb_quantized=True, module=new
        )
        new.bias, new.quant_state, new.support_avx512bf16_for_cpu = layer.bias, state, False
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
