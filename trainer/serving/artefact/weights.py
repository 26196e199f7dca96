"""The trained weights of a checkpoint as files of an artefact, and back: the same tensors under the names that PEFT and Hugging Face use.

In a checkpoint the backbone's names begin with `backbone.model.`, LoRA matrices have `.default` behind `lora_A` and `lora_B` (the name of
peft's adapter), and the fusion network's begin with `fusion.`. Nothing is converted: every tensor keeps its type and its bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from trainer.config import AdapterConfig, ModelConfig
from trainer.files import load_json, write_json
from trainer.models.backbone.adapter import adapt
from trainer.models.backbone.fingerprint import is_finite
from trainer.models.backbone.loading import BackboneError, faults_before_reading, load_shape, model_file
from trainer.models.backbone.positions import skeleton
from trainer.serving.artefact.description import ADAPTER, BACKBONE, FUSION, AdapterEntry, ArtefactError, some
from trainer.serving.artefact.tensors import Form, StoredTensors, copy_tensors, write_shards

OF_BACKBONE, OF_FUSION = "backbone.model.", "fusion."
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
LIMIT = ".standardise.limit"  # of standardised features: infinity where they are not clipped
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class TrainedBackbone:
    """What training changes in a backbone: the forms of its trained tensors by their names in a checkpoint, and peft's config of LoRA."""

    forms: dict[str, tuple[int, ...]]
    lora: LoraConfig | None


def trained_backbone(config: ModelConfig, folder: Path | None) -> TrainedBackbone:
    """What the config's adapter trains in its backbone, by peft itself on the model without values.

    Raises:
        ValueError: the backbone's configuration cannot be read, or LoRA does not fit it.
    """
    if config.adapter.kind == "frozen":
        return TrainedBackbone({}, None)
    load_shape(config.backbone, folder)  # its faults are explained
    model = skeleton(config.backbone, folder)
    if model is None:
        raise BackboneError(
            f"{config.backbone.name}: no model can be made of its configuration without its weights, so that nothing says which of its "
            "layers are trained"
        )
    adapted: Any = adapt(model, config.adapter, torch.float32)
    lora: Any = adapted.peft_config["default"] if isinstance(adapted, PeftModel) else None
    trained = {f"{OF_BACKBONE}{n}": tuple(p.shape) for n, p in adapted.named_parameters() if p.requires_grad}
    return TrainedBackbone(trained, lora)


def check_trained(
    weights: StoredTensors, expected: TrainedBackbone, config: ModelConfig, step: int, force: bool
) -> list[str]:
    """Refuse a checkpoint whose weights of the backbone are not those that the config trains, or that training has not moved.

    An adapter without its tensors, or with `lora_B` of zeros, changes nothing: whoever opens it would get the base without a word. Returned
    are, with `force`, the faults that were let pass.

    Raises:
        ArtefactError: tensors that are missing, too many or of another shape (never let pass); tensors that are not finite, and matrices
            `lora_B` of zeros after a step (let pass by `force`).
    """
    own = {name: weights.form(name).shape for name in weights if name.startswith(OF_BACKBONE)}
    faults = [f"{name} is missing" for name in expected.forms if name not in own]
    faults += [f"{name} is none of the layers that the config trains" for name in own if name not in expected.forms]
    faults += [
        f"{name} is {shape} and not {expected.forms[name]}"
        for name, shape in own.items()
        if expected.forms.get(name, shape) != shape
    ]
    has_fusion = any(name.startswith(OF_FUSION) for name in weights)
    if has_fusion != bool(config.fusion.pseudo_tokens):
        faults.append(
            f"it has {'a' if has_fusion else 'no'} fusion network, and pseudo_tokens={config.fusion.pseudo_tokens}"
        )
    if strange := [name for name in weights if not name.startswith((OF_BACKBONE, OF_FUSION))]:
        faults.append(f"{some(strange)} belongs to no part of the model")
    if faults:
        pairs = sum(name.endswith(B) for name in expected.forms)
        layers = f" ({pairs} layers get LoRA)" if pairs else ""
        raise ArtefactError(f"the checkpoint's weights are not those that model.adapter trains{layers}: {some(faults)}")
    doubts = [f"{name} is not finite" for name in weights if not name.endswith(LIMIT) and not is_finite(weights[name])]
    zeros = [name for name in own if name.endswith(B) and not bool(weights[name].any())]
    total = sum(name.endswith(B) for name in own)
    if zeros and step > 0:
        doubts.append(
            f"{len(zeros)} of {total} matrices lora_B are all zeros after {step} steps, so that these layers answer as without the adapter: "
            f"{some(zeros)}. Either no step has moved them (learning rate 0, or every step skipped), or they were not gathered when the "
            "checkpoint was written"
        )
    if doubts and not force:
        raise ArtefactError(f"the checkpoint's weights look wrong: {some(doubts)}. --force exports them as they are")
    return doubts


def write_weights(
    out: Path, weights: StoredTensors, config: ModelConfig, expected: TrainedBackbone, base: str | None
) -> AdapterEntry:
    """Write the adapter and the fusion network of a checkpoint into the folder `out`; every tensor is compared with the checkpoint's.

    `base` is the name of the backbone that PEFT's config names, None where only this folder has it.

    Raises:
        ArtefactError: what was written is not what the checkpoint holds.
        OSError: it cannot be written.
    """
    fusion = {name: name.removeprefix(OF_FUSION) for name in weights if name.startswith(OF_FUSION)}
    if fusion:
        copy_tensors(out / FUSION, weights, fusion)
    own = [name for name in weights if name.startswith(OF_BACKBONE)]
    kind: AdapterConfig = config.adapter
    if kind.kind != "lora":
        return AdapterEntry(kind=kind.kind, tensors=len(own))
    folder = out / ADAPTER
    folder.mkdir()
    copy_tensors(folder / ADAPTER_WEIGHTS, weights, {name: peft_name(name) for name in own})
    assert expected.lora is not None
    expected.lora.base_model_name_or_path = base
    expected.lora.inference_mode = True
    if not isinstance(expected.lora.target_modules, str):  # a set, which every process would write in another order
        expected.lora.target_modules = sorted(expected.lora.target_modules or ())
    expected.lora.save_pretrained(str(folder))
    pairs = sum(name.endswith(A) for name in own)
    return AdapterEntry(kind="lora", rank=kind.rank, alpha=kind.alpha, pairs=pairs, tensors=len(own))


def write_whole_backbone(out: Path, weights: StoredTensors, config: ModelConfig, folder: Path | None) -> None:
    """Write the backbone of a run with `adapter.kind: full` in Hugging Face form: what was trained, beside the base's configuration.

    Raises:
        ArtefactError: the files do not make the model, such as of a family whose files have other tensors than its model.
        OSError: they cannot be written.
    """
    target = out / BACKBONE
    target.mkdir()
    names = {name.removeprefix(OF_BACKBONE): name for name in weights if name.startswith(OF_BACKBONE)}
    forms = {new: weights.form(old) for new, old in names.items()}
    write_shards(target, forms, lambda new: weights[names[new]])
    copy_model_files(config, folder, target, common_dtype(forms))
    faults = faults_before_reading(config.backbone.model_copy(update={"name": str(target)}), target)
    if faults:
        raise ArtefactError(
            f"the trained backbone cannot be written in Hugging Face form, since models of this family have other tensors in their files: {some(faults)}"
        )


def copy_model_files(config: ModelConfig, folder: Path | None, target: Path, dtype: str) -> None:
    """Put the base's configuration, tokenizer and, where the run trusts it, its code beside weights of another type of numbers."""
    raw = read_model_config(config, folder)
    write_json(target / "config.json", with_dtype(raw, dtype))
    generation = model_file(config.backbone, "generation_config.json", folder)
    if generation is not None:
        shutil.copyfile(generation, target / generation.name)
    copy_tokenizer(config, folder, target)
    copy_code(config, folder, target)


def read_model_config(config: ModelConfig, folder: Path | None) -> dict[str, Any]:
    """The base's `config.json`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = model_file(config.backbone, "config.json", folder)
    if path is None:
        raise BackboneError(f"{config.backbone.name} has no config.json")
    raw = load_json(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict)
    return raw


def with_dtype(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A model's configuration for weights of type `dtype`, in the nested ones too."""
    changed = {key: with_dtype(value, dtype) if isinstance(value, Mapping) else value for key, value in raw.items()}
    changed |= {key: dtype for key in ("dtype", "torch_dtype") if isinstance(raw.get(key), str)}
    if not {"dtype", "torch_dtype"} & changed.keys() and "model_type" in raw:
        changed["dtype"] = dtype
    changed.pop("transformers_weights", None)  # the name of the base's file
    return changed


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def copy_tokenizer(config: ModelConfig, folder: Path | None, target: Path) -> None:
    """Copy the files of the base's tokenizer, byte by byte."""
    for name in TOKENIZER_FILES:
        if (path := model_file(config.backbone, name, folder)) is not None:
            shutil.copyfile(path, target / name)


def copy_code(config: ModelConfig, folder: Path | None, target: Path) -> None:
    """Copy the Python files of a model that the run trusts, which its configuration names."""
    if not config.backbone.trust_remote_code:
        return
    raw = read_model_config(config, folder)
    named = {str(value).partition(".")[0] for value in dict(raw.get("auto_map", {})).values() if "--" not in str(value)}
    place = model_file(config.backbone, "config.json", folder)
    assert place is not None
    local = {path.name for path in place.parent.glob("*.py")}
    for name in sorted({f"{module}.py" for module in named} | local):
        if (path := model_file(config.backbone, name, folder)) is not None:
            shutil.copyfile(path, target / name)


def trained_state(folder: Path, kind: str) -> dict[str, Tensor]:
    """The trained weights of an artefact by their names in a checkpoint, for :func:`trainer.checkpoint.weights.load_trainable_state`."""
    state: dict[str, Tensor] = {}
    if (folder / FUSION).is_file():
        fusion = StoredTensors([folder / FUSION])
        state |= {f"{OF_FUSION}{name}": fusion[name] for name in fusion}
    if kind == "lora":
        adapter = StoredTensors([folder / ADAPTER / ADAPTER_WEIGHTS])
        state |= {checkpoint_name(name): adapter[name] for name in adapter}
    if kind == "full":
        whole = StoredTensors(sorted((folder / BACKBONE).glob("model*.safetensors")))
        state |= {f"{OF_BACKBONE}{name}": whole[name] for name in whole}
    return state


def peft_name(name: str) -> str:
    """A LoRA matrix's name in PEFT's files, of its name in a checkpoint."""
    return name.removeprefix(OF_BACKBONE).replace(".default.", ".")


def checkpoint_name(name: str) -> str:
    """The other way round."""
    head, matrix, tail = name.rpartition(".lora_")
    return f"{OF_BACKBONE}{head}{matrix}{tail.replace('.', '.default.', 1)}"


def common_dtype(forms: Mapping[str, Form]) -> str:
    """The type of numbers that most weights have, as a model's configuration writes it."""
    sizes: dict[torch.dtype, int] = {}
    for form in forms.values():
        sizes[form.dtype] = sizes.get(form.dtype, 0) + form.size
    return DTYPE_NAMES.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")
