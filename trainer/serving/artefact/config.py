"""The config of an artefact as it is opened; light to import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config import RunConfig, is_text_setting
from trainer.config_files import parse_overrides
from trainer.saved_config import completed_config
from trainer.schema import dotted
from trainer.serving.artefact.description import BACKBONE, DESCRIPTION, Description, plain_config

NAME, REVISION = "model.backbone.name", "model.backbone.revision"


def opened_config(folder: Path, description: Description, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of an artefact, its plug-ins and its own backbone where they lie now.

    Raises:
        ValueError: it has settings that this version does not have, or overrides make no config of it.
    """
    over = parse_overrides(overrides, is_text_setting)
    written = dotted(dict(plain_config(description)))
    written["model.fusion.plugins"] = [
        str(folder.resolve() / name) if name in description.code else name
        for name in written.get("model.fusion.plugins", [])
    ]
    if description.adapter.kind == "full":
        written |= {NAME: str(folder / BACKBONE), REVISION: None}
    elif description.base.place != "inside":
        written |= {NAME: description.base.name, REVISION: description.base.revision}
    if any(word.partition("=")[0] == NAME for word in overrides):
        written[REVISION] = None  # the commit is of the other place
    version = f" ({description.version})" if description.version else ""
    return completed_config(written, over, str(folder / DESCRIPTION), version)
