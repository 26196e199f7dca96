"""Which modalities and experts of a config are built."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import trainer.models.fusion.experts  # noqa: F401  # registers those that are built in
from trainer.config import MODALITIES, FusionConfig, Modality
from trainer.models.fusion.expert import Expert
from trainer.models.fusion.registry import registered_experts
from trainer.plugins import PluginError, load_plugin

log = logging.getLogger(__name__)


def kept_modalities(config: FusionConfig, inputs: Mapping[str, Mapping[str, int]]) -> tuple[Modality, ...]:
    """The modalities that the config keeps and that some task has."""
    if not inputs:
        raise ValueError("the fusion network needs at least one task")
    had = {"text", *(name for widths in inputs.values() for name, width in widths.items() if width)}
    kept = tuple(name for name in MODALITIES if name in config.modalities and name in had)
    if not kept:
        raise ValueError(f"fusion.modalities={config.modalities}, but no task of this run has any of them")
    return kept


def expert_classes(config: FusionConfig) -> dict[str, type[Expert]]:
    """Name -> class of the experts that the config names, in the order of their places in the gate.

    `model.fusion.plugins` are imported first.

    Raises:
        ValueError: a plugin that cannot be imported, or a name that nobody registered, with the nearest one.
    """
    for plugin in config.plugins:
        _load(plugin)
    known = registered_experts()
    faults = []
    for name in config.ordered_experts:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            faults.append(f"model.fusion.experts: no expert is registered as {name!r}; {hint}")
    if faults:
        raise ValueError("\n".join(faults))
    return {name: known[name] for name in config.ordered_experts}


def fitting_experts(classes: dict[str, type[Expert]], modalities: Sequence[str]) -> dict[str, type[Expert]]:
    """Those of the experts that can be built for these modalities: the others need more of them.

    Raises:
        ValueError: none is left.
    """
    kept = {name: cls for name, cls in classes.items() if cls.least_modalities <= len(modalities)}
    if not kept:
        names = ", ".join(f"{name} ({cls.least_modalities})" for name, cls in classes.items())
        raise ValueError(
            f"no expert can be built: each needs so many modalities: {names}; and there is only {', '.join(modalities)}"
        )
    return kept


@functools.cache  # once a process: so does the log
def _load(plugin: str) -> None:
    if plugin.endswith(".py") and not Path(plugin).is_file():
        raise ValueError(
            f"model.fusion.plugins: there is no file {plugin}. Where it has moved, name its new place: "
            f"model.fusion.plugins=[/new/place/{Path(plugin).name}]"
        )
    log.warning("model.fusion.plugins: Python code of %s runs in this process", plugin)
    try:
        load_plugin(plugin)
    except PluginError as error:
        raise ValueError(f"model.fusion.plugins: {error}") from error
