"""A trained model by its place: an exported folder or a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.distributed.world import World
from trainer.run.model_parts import OpenedModel
from trainer.run.saved import open_run
from trainer.serving.artefact.description import is_artefact
from trainer.serving.artefact.opening import open_artefact
from trainer.serving.check import check_place


def open_model(
    source: str | Path, world: World, overrides: Sequence[str] = (), trust_code: str | None = None
) -> OpenedModel:
    """The trained model at `source`: an artefact of `egmf export`, or a run folder.

    Every rank calls this.

    Args:
        overrides: ``dotted.key=value`` words that replace the config's.
        trust_code: the hash of Python code that the model would bring along, which its user has read.

    Raises:
        ValueError: there is no such model, or it cannot be opened; the message says why and what to do.
    """
    folder = Path(source)
    check_place(folder)
    if is_artefact(folder):
        return open_artefact(folder, world, overrides, trust_code)
    return open_run(folder, world, overrides, agreed=trust_code)
