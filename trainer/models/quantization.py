"""NF4 weights by bitsandbytes: what is quantised, what is refused, and what CPUs need.

Source: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

BLOCK = 64  # weights that share one scale


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
    """Refuse, before anything is loaded, linear layers whose input is no multiple of the block size.

    bitsandbytes computes wrong values for them on CPU, without an error.

    Raises:
        ValueError: with the names of all such layers.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    odd: Counter[tuple[str, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.in_features % BLOCK:
            odd[".".join(p for p in name.split(".") if not p.isdigit()), module.in_features] += 1
    if odd:
        listed = "; ".join(f"{name} (in_features {size}, {n} of them)" for (name, size), n in odd.items())
        raise ValueError(
            f"{where} cannot be quantised to NF4: the inputs of these layers are no multiple of {BLOCK}: {listed}. "
            "Use model.backbone.quantization=none, or a model of other sizes"
        )


def settle(model: nn.Module, where: str) -> int:
    """Check a loaded 4-bit model; returns the number of 4-bit layers.

    Raises:
        ValueError: nothing was quantised, or a weight is not stored as uint8.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    if not layers:
        raise ValueError(f"{where} has no linear layer that can be quantised: use model.backbone.quantization=none")
    for name, layer in layers.items():
        if layer.weight.dtype != torch.uint8 or getattr(layer.weight, "quant_state", None) is None:
            raise ValueError(f"{where}: {name} was not quantised (stored as {layer.weight.dtype})")
    return len(layers)
