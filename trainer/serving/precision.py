"""Where and how exactly a trained model computes: its device, and another precision or quantisation than it was trained in.

A model is opened as it was trained, so that its frozen weights can be compared with those of the training, and is changed then.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from trainer.config import RunConfig
from trainer.distributed.deepspeed_config import DTYPES, dtype_of
from trainer.models.backbone.linear4bit import FrozenLinear4bit
from trainer.models.backbone.quantization import check_sizes
from trainer.run.model_parts import OpenedModel

QUANTIZATIONS = ("none", "nf4")
_HALF_ONLY = ("flash_attention_2", "varlen")  # attention on a GPU that takes no fp32


def choose_device(device: str) -> torch.device:
    """The device of a word: `auto` is a GPU where there is one.

    Raises:
        ValueError: another word than auto, cpu, cuda, cuda:N, or a GPU that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device is auto, cpu, cuda or cuda:N, not {device!r}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not there):
        return torch.device("cpu")
    number = int(device.partition(":")[2] or 0)
    if number >= there:
        raise ValueError(f"device={device}: this machine has {there or 'no'} GPU{'s' if there > 1 else ''}")
    torch.cuda.set_device(number)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training: it makes a plan for every new shape
    return torch.device("cuda", number)


def check_choice(device: torch.device, dtype: str | None, quantization: str | None) -> None:
    """Refuse what no model can compute in here, before one is opened, which may take minutes.

    Raises:
        ValueError: everything that is wrong.
    """
    if faults := _faults(device, dtype or "fp32", quantization or "none"):
        raise ValueError("\n".join(faults))


def _faults(device: torch.device, dtype: str, quantization: str) -> list[str]:
    faults = []
    if dtype not in DTYPES:
        faults.append(f"dtype is {', '.join(DTYPES)}, not {dtype!r}")
    if quantization not in QUANTIZATIONS:
        faults.append(f"quantization is {' or '.join(QUANTIZATIONS)}, not {quantization!r}")
    if dtype == "fp16" and device.type == "cpu":
        faults.append("dtype=fp16 needs a GPU: on a CPU use fp32 or bf16")
    return faults


def convert(opened: OpenedModel, dtype: str | None, quantization: str | None) -> None:
    """Let an opened model compute in another precision, or with another quantisation of its backbone; None: as it was trained.

    NF4 rounds the dense weights as they are on the device. `none` gives the values that the NF4 weights stand for, in
    `dtype`: those that the adapter was trained on, and not those of the base before it was quantised.

    Raises:
        ValueError: everything that does not go together, before anything is changed.
    """
    config, backbone, device = opened.config, opened.parts.model.backbone, opened.world.device
    was = next(name for name, known in DTYPES.items() if known is dtype_of(config))
    before = config.model.backbone.quantization
    wanted, after = dtype or was, quantization or before
    faults = _faults(device, wanted, after)
    exact = wanted == "fp32" and device.type == "cuda" and backbone.attention in _HALF_ONLY
    if exact and config.model.backbone.attention != "auto":
        faults.append(
            f"dtype=fp32: model.backbone.attention={backbone.attention} of the run takes only bf16 and fp16: add the override "
            "model.backbone.attention=auto"
        )
    if faults:
        raise ValueError("\n".join(faults))
    if exact:
        backbone.attention = "blocks"
    if before == "none" and after == "nf4":
        check_sizes(backbone.base.config, config.model.backbone.name, config.model.backbone.trust_remote_code)
        _quantise(backbone.base, DTYPES[wanted], config.model.backbone.double_quantization)
    elif before == "nf4" and after == "none":
        _dequantise(backbone.base, DTYPES[wanted])
    if wanted != was:
        opened.parts.model.to(DTYPES[wanted])
        for module in backbone.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = DTYPES[wanted]
                weight: Any = module.weight
                weight.quant_state.dtype = DTYPES[wanted]
    opened.config = _changed(config, wanted, after)


def _quantise(base: nn.Module, dtype: torch.dtype, double: bool) -> None:
    """Turn the linear layers into 4-bit ones, as they are when a model is loaded in NF4: all but the head and those of LoRA."""
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    for name, layer in list(base.named_modules()):
        if type(layer) is not nn.Linear or layer is head or "lora_" in name:
            continue
        packed: Any = Linear4bit(  # type: ignore[no-untyped-call]
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=dtype,
            compress_statistics=double,
            quant_type="nf4",
            quant_storage=torch.uint8,
            device="meta",
        )
        weight: Any = Params4bit(
            layer.weight.data,
            requires_grad=False,
            compress_statistics=double,
            quant_type="nf4",
            quant_storage=torch.uint8,
            module=packed,
        )
        packed.weight = weight.to(layer.weight.device)  # quantises
        packed.bias = layer.bias
        FrozenLinear4bit.adopt(packed)
        _replace(base, name, packed.train(layer.training))


def _dequantise(base: nn.Module, dtype: torch.dtype) -> None:
    """Turn 4-bit layers into dense ones that hold the same values."""
    for name, layer in list(base.named_modules()):
        if isinstance(layer, Linear4bit):
            packed: Any = layer.weight
            weight = dequantize_4bit(packed.data, packed.quant_state).to(dtype)
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=False)
            dense.bias = layer.bias
            _replace(base, name, dense.train(layer.training))


def _replace(base: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(base.get_submodule(owner), leaf, module)


def _changed(config: RunConfig, dtype: str, quantization: str) -> RunConfig:
    """The config of what the model is now."""
    backbone = config.model.backbone.model_copy(update={"quantization": quantization})
    raw = {key: value for key, value in config.deepspeed.items() if key not in ("bf16", "fp16")}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"backbone": backbone}),
            "train": config.train.model_copy(update={"precision": dtype}),
            "deepspeed": raw,
        }
    )
