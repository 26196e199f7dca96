"""What of the backbone is trained: LoRA matrices, everything, or nothing.

Source: Hu et al. 2021 (LoRA), arXiv 2106.09685.
"""

from __future__ import annotations

import difflib
import logging

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from trainer.config import AdapterConfig

log = logging.getLogger(__name__)

NAMES_OF_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj"})
"""Of layers that peft takes for parts of fused experts, wherever they stand: it adapts those by `target_parameters`, which has no dropout
and no hooks that ZeRO-3 could gather weights for."""


def adapt(model: PreTrainedModel, config: AdapterConfig, dtype: torch.dtype) -> nn.Module:
    """`model` with exactly those parameters trainable that `config` names.

    LoRA adds to a frozen layer `y = W x` the term `alpha / rank * B A dropout(x)`, B zero at first. Its matrices have the
    dtype of training. The output head never gets one: hidden states reach it outside the model's own forward. Nor do experts that
    are fused into one weight: `all-linear` means the linear layers beside them, attention above all, with a warning.

    Raises:
        ValueError: a target that names no linear layer, with the nearest names.
    """
    if config.kind != "lora":
        model.requires_grad_(config.kind == "full")
        return model
    check_targets(model, config)
    targets: str | list[str] = config.targets if config.targets == "all-linear" else list(config.targets)
    if config.targets == "all-linear" and (experts := fused_experts(model)):
        targets, left = _beside_experts(model)
        kind, without = model.config.model_type, ", ".join([*experts, *left])
        log.warning("LoRA of a mixture of experts (%s) adapts %s, and not %s", kind, ", ".join(targets), without)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number does
        lora_dropout=config.dropout,
        target_modules=targets,
        bias="none",
    )
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"LoRA does not fit this backbone ({model.config.model_type}): {error}") from error
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            if "lora_" not in name:
                raise ValueError(f"peft made {name} trainable, which is not a LoRA matrix")
            parameter.data = parameter.data.to(dtype)
    return adapted


def check_targets(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Refuse what LoRA cannot adapt in `model`, which may be one without weights.

    Raises:
        ValueError: every target that names no linear layer, the head, or experts, with what there is.
    """
    if config.kind != "lora":
        return
    if config.targets != "all-linear":
        _check_names(model, list(config.targets))
    elif fused_experts(model):
        _beside_experts(model)


def fused_experts(model: nn.Module) -> list[str]:
    """The weights that hold all experts of a layer at once, which are in no linear layer; by kind."""

    def holds_all(name: str, parameter: nn.Parameter) -> bool:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of a weight that ZeRO-3 has partitioned
        return len(shape) == 3 and ".experts." in name

    names = (name for name, parameter in model.named_parameters() if holds_all(name, parameter))
    return sorted({".".join(part for part in name.split(".") if not part.isdigit()) for name in names})


def _beside_experts(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """The linear layers that `all-linear` means where experts are fused: neither those that peft takes for experts by their names, nor
    routers, which are linear layers of another kind and return more than one tensor; and those that it leaves."""
    head = model.get_output_embeddings()
    linear = [(n.rpartition(".")[2], m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    left = {leaf for leaf, module in linear if type(module) is not nn.Linear or leaf in NAMES_OF_EXPERTS}
    targets = sorted({leaf for leaf, _ in linear} - left)
    kind = model.config.model_type
    if not targets:
        raise ValueError(
            f"model.adapter: models of type {kind!r} have no linear layer beside their experts for LoRA: use another"
        )
    return targets, sorted(left)


def _check_names(model: PreTrainedModel, targets: list[str]) -> None:
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    head_names = {n for n, m in model.named_modules() if m is head and n}
    short = sorted({n.rpartition(".")[2] for n in names})
    faults = [] if targets else ["the list is empty: name layers, or use 'all-linear'"]
    experts = fused_experts(model)
    for target in targets:
        if experts and target.rpartition(".")[2] in NAMES_OF_EXPERTS:
            others = ", ".join(s for s in short if s not in NAMES_OF_EXPERTS)
            faults.append(
                f"{target!r} names experts, which are fused here ({', '.join(experts)}) and get no LoRA; there are: {others}"
            )
        elif target in head_names or any(n.endswith(f".{target}") for n in head_names):
            faults.append(f"{target!r} is the output head, which gets no LoRA")
        elif not any(n == target or n.endswith(f".{target}") for n in names):
            near = difflib.get_close_matches(target.rpartition(".")[2], short, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(short)}"
            faults.append(f"{target!r} names no linear layer; {hint}")
    if faults:
        raise ValueError("model.adapter.targets: " + "; ".join(faults))
