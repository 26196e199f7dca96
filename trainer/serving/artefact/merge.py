"""The merged backbone: base and LoRA as one model in Hugging Face form, one weight in memory at a time.

`W' = W + alpha / rank * B A`, summed in float32 and rounded once, to the type that was asked for. W is the weight that training held: cast to
its precision, and of a base in 4 bits what these give back (the adapter was trained on that, not on the weights before).

Source: Hu et al. 2021 (LoRA), arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from trainer.config import RunConfig
from trainer.distributed.deepspeed_config import DTYPES, dtype_of
from trainer.models.backbone.loading import faults_before_reading
from trainer.models.backbone.streamed import StreamedBase
from trainer.serving.artefact.description import MERGED, ArtefactError, some
from trainer.serving.artefact.tensors import SHARD, Form, StoredTensors, write_shards
from trainer.serving.artefact.weights import DTYPE_NAMES, OF_BACKBONE, A, B, copy_model_files

INSIDE = f"{OF_BACKBONE}base_model.model."  # before the name of a layer with LoRA


def merge(
    out: Path, weights: StoredTensors, config: RunConfig, folder: Path, precision: str, most: int = SHARD
) -> None:
    """Write `merged/`: the base of `config` with the LoRA matrices of `weights`.

    Args:
        folder: of the tiny backbone.
        precision: of the weights: bf16, fp16 or fp32.
        most: bytes of a file.

    Raises:
        ArtefactError: a layer with LoRA is in none of the base's files, a weight is not finite in this precision, or the files do not make the model.
        OSError: they cannot be written.
    """
    base = StreamedBase(config.model.backbone, dtype_of(config), folder)
    dtype = DTYPES[precision]
    pairs = {name.removeprefix(INSIDE).removesuffix(A): name for name in weights if name.endswith(A)}
    _check_found(base, pairs)
    scaling = config.model.adapter.alpha / config.model.adapter.rank

    def make(name: str) -> Tensor:
        parameter = base.parameter_of.get(name)
        if parameter is None:  # such as one of many experts, which the model has in one weight
            stored = base.stored(name)
            return stored.to(base.dtype).to(dtype) if stored.is_floating_point() else stored
        values = base.weight(name).values
        layer = parameter.removesuffix(".weight")
        if layer in pairs:
            first = weights[pairs[layer]].float()
            second = weights[pairs[layer].removesuffix(A) + B].float()
            delta = scaling * (second @ first)
            transposed = isinstance(base.model.get_submodule(layer), Conv1D)  # GPT-2 stores its weights so
            values = values.float() + (delta.T if transposed else delta)
        made = values.to(dtype) if values.is_floating_point() else values
        if made.is_floating_point() and not bool(made.isfinite().all()):
            raise ArtefactError(f"{parameter} is not finite in {precision} after merging: choose --dtype bf16 or fp32")
        return made

    target = out / MERGED
    target.mkdir()
    forms = {}
    for name in base.files:
        stored = base.stored(name)
        forms[name] = Form(dtype if stored.is_floating_point() else stored.dtype, tuple(stored.shape))
    write_shards(target, forms, make, most)
    copy_model_files(config.model, folder, target, DTYPE_NAMES[dtype])
    backbone = config.model.backbone.model_copy(update={"name": str(target), "quantization": "none"})
    if faults := faults_before_reading(backbone, target):
        raise ArtefactError(f"the merged backbone does not make a model: {some(faults)}")


def _check_found(base: StreamedBase, pairs: Mapping[str, str]) -> None:
    """Refuse a base whose files have not all the layers with LoRA, or not all that are held in 4 bits, as the model has them."""
    found = set(base.parameter_of.values())
    missing = [layer for layer in pairs if f"{layer}.weight" not in found]
    missing += [name for name, _ in base.model.named_parameters() if base.is_quantised(name) and name not in found]
    if missing:
        raise ArtefactError(
            f"the files of {base.config.name} do not have these weights as its model does, so that they cannot be merged one by one: {some(missing)}. "
            "Merge the adapter where the model fits into memory (PeftModel.from_pretrained(…).merge_and_unload())"
        )
