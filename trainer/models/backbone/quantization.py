"""NF4 weights by bitsandbytes: what is quantised, what is refused, and what CPUs need.

Source: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

log = logging.getLogger(__name__)

BLOCK = 64  # weights that share one scale
LEFT = 0.01  # share of the parameters that may stay unquantised, embeddings and head aside


def nf4_config(dtype: torch.dtype, double_quantization: bool) -> BitsAndBytesConfig:
    """NF4 with packed uint8 storage (floating storage would be cast by DeepSpeed), computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def check_sizes(config: PretrainedConfig, where: str, trust_remote_code: bool = False) -> None:
    """Refuse, before anything is loaded, what cannot be quantised.

    Layers that store their weights transposed (GPT-2). Linear layers whose input is not a multiple of the block size: bitsandbytes computes wrong values for them on CPU, without
    an error. Matrices that belong to no linear layer, such as the fused experts of mixture models, where they are more than
    `LEFT` of the model: they would stay in the precision of training. Smaller ones (routers) do, and are logged.

    Raises:
        ValueError: with the names of all such layers and weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    transposed = sorted({_kind(name) for name, module in model.named_modules() if isinstance(module, Conv1D)})
    if transposed:
        raise ValueError(
            f"{where} cannot be quantised to NF4: its layers store their weights transposed (Conv1D): {', '.join(transposed)}. "
            "Use model.backbone.quantization=none, or a model of another family"
        )
    _check_outside(model, where)
    head = model.get_output_embeddings()
    odd: Counter[tuple[str, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.in_features % BLOCK:
            odd[_kind(name), module.in_features] += 1
    if odd:
        listed = "; ".join(f"{name} (in_features {size}, {n} of them)" for (name, size), n in odd.items())
        raise ValueError(
            f"{where} cannot be quantised to NF4: the inputs of these layers are not multiples of {BLOCK}: {listed}. "
            "Use model.backbone.quantization=none, or a model of other sizes"
        )


def _check_outside(model: nn.Module, where: str) -> None:
    """Matrices outside of linear layers and embeddings: refused where they are a good part of the model."""
    shapes_of: dict[str, list[torch.Size]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                shapes_of.setdefault(_kind(f"{name}.{leaf}"), []).append(parameter.shape)
    total = sum(parameter.numel() for parameter in model.parameters())
    shares = {kind: sum(shape.numel() for shape in shapes) / total for kind, shapes in shapes_of.items()}
    listed = [
        f"{kind} ({' x '.join(map(str, shapes[0]))}, {len(shapes)} of them, {shares[kind]:.1%} of the model)"
        for kind, shapes in shapes_of.items()
    ]
    if sum(shares.values()) > LEFT:
        raise ValueError(
            f"{where} cannot be quantised to NF4: these weights are in no linear layer and would stay in the precision of "
            f"training: {'; '.join(listed)}. Use model.backbone.quantization=none (ZeRO-3 partitions them), or a dense model"
        )
    if listed:
        log.info("%s: left in the precision of training: %s", where, "; ".join(listed))


def _kind(name: str) -> str:
    """A module's or weight's name without the numbers of layers and experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def settle(model: nn.Module, where: str) -> int:
    """Check a loaded 4-bit model; returns the number of 4-bit layers.

    Raises:
        ValueError: nothing was quantised, more than `LEFT` of the linear layers (the head aside) was left out, or a weight
            is not stored as uint8.
    """
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    left = {name: m for name, m in linear.items() if not isinstance(m, Linear4bit)}
    listed = ", ".join(sorted({_kind(name) for name in left}))
    share = sum(m.in_features * m.out_features for m in left.values())
    if share > LEFT * sum(m.in_features * m.out_features for m in linear.values()):
        raise ValueError(f"{where}: these layers were not quantised: {listed}. Use model.backbone.quantization=none")
    if left:
        log.info("%s: left in the precision of training: %s", where, listed)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    if not layers:
        raise ValueError(f"{where} has no linear layer that can be quantised: use model.backbone.quantization=none")
    for name, layer in layers.items():
        if layer.weight.dtype != torch.uint8 or getattr(layer.weight, "quant_state", None) is None:
            raise ValueError(f"{where}: {name} was not quantised (stored as {layer.weight.dtype})")
    return len(layers)
