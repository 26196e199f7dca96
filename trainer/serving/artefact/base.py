"""The backbone that a run was trained on: where it is, which commit, under which licence, and whether it is still the same."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard

from trainer.checkpoint.state import differs_from_base
from trainer.config import AdapterConfig, BackboneConfig, RunConfig
from trainer.distributed.deepspeed_config import dtype_of
from trainer.models.backbone.causal_lm import build_backbone
from trainer.models.backbone.fingerprint import BaseFingerprint
from trainer.models.backbone.loading import BackboneError, model_file
from trainer.models.backbone.streamed import StreamedBase
from trainer.serving.artefact.description import ArtefactError, BaseEntry

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")
PRECISIONS: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip


def describe_base(config: RunConfig, folder: Path, recorded: str) -> BaseEntry:
    """What is known of the backbone; `recorded` is its hash in the run's checkpoint, `folder` that of the tiny one."""
    backbone = config.model.backbone
    place: Literal["inside", "folder", "hub"]
    name, revision = backbone.name, backbone.revision
    if config.model.adapter.kind == "full" or backbone.name == "tiny":
        place = "inside"
    elif Path(backbone.name).expanduser().is_dir():
        place, name = "folder", str(Path(backbone.name).expanduser().resolve())
    else:
        place, revision = "hub", revision_of(backbone)
    return BaseEntry(
        place=place,
        name=name,
        revision=revision,
        hash=recorded,
        quantization=backbone.quantization,
        double_quantization=backbone.double_quantization,
        precision=PRECISIONS[dtype_of(config)],
        license=license_of(backbone, folder),
    )


def revision_of(config: BackboneConfig) -> str | None:
    """The commit of a hub's model that is read on this machine, by its place in the cache; what the config says where that does not tell."""
    path = model_file(config, "config.json")
    found = None if path is None else COMMIT.fullmatch(path.parent.name)
    return config.revision if found is None else found[0]


def license_of(config: BackboneConfig, folder: Path) -> str | None:
    """The licence that the front matter of the backbone's card names; where it names none, the name of its licence file; else None."""
    if config.name == "tiny":
        return None
    try:
        card = model_file(config, "README.md", folder)
        if card is not None:
            data: Any = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
            named = data.license_name if data.license == "other" and data.license_name else data.license
            if named:
                return str(named)
        found = next((name for name in LICENCES if model_file(config, name, folder) is not None), None)
    except (BackboneError, OSError, ValueError) as error:
        log.debug("no licence of %s is known: %s", config.name, error)
        return None
    return None if found is None else f"see {found} of {Path(config.name).name}"


def check_base(config: RunConfig, folder: Path, recorded: str, where: Path) -> None:
    """Refuse a backbone whose frozen weights are no longer those that a run was trained on, without holding the model where that is possible.

    Its weights are read one by one; where that does not give the recorded hash, as of families whose files have other tensors than their
    model, the model is loaded, which decides.

    Args:
        recorded: the hash in the run's checkpoint.
        where: what messages call the run.

    Raises:
        ArtefactError: it is another.
        BackboneError: it cannot be read.
    """
    model = config.model
    if model.adapter.kind == "full":
        return  # nothing of it was frozen
    found = streamed_fingerprint(model.backbone, dtype_of(config), folder)
    doubly = model.backbone.quantization == "nf4" and model.backbone.double_quantization
    if found is not None and not differs_from_base(recorded, found, doubly, where):
        return
    log.info("the weights of %s are loaded whole, to compare them with the run's", model.backbone.name)
    frozen = AdapterConfig(kind="frozen")
    loaded = build_backbone(model.backbone, frozen, dtype_of(config), "cpu", folder=folder).fingerprints
    if differs_from_base(recorded, loaded, doubly, where):
        raise ArtefactError(other_base(config.model.backbone.name, recorded, loaded))


def streamed_fingerprint(config: BackboneConfig, dtype: torch.dtype, folder: Path) -> BaseFingerprint | None:
    """See :meth:`trainer.models.backbone.streamed.StreamedBase.fingerprint`."""
    return StreamedBase(config, dtype, folder).fingerprint()


def other_base(name: str, recorded: str, found: BaseFingerprint) -> str:
    """The message that a backbone is another than that of the training."""
    return (
        f"{name} does not hold the weights that the adapter was trained on (hash {recorded}, here {found.source}): name the folder that does "
        "with model.backbone.name=PATH, or the hub's commit with model.backbone.revision=COMMIT"
    )
