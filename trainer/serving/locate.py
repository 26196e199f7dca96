"""A trained model by its place: an exported folder, a run folder, or an address in MLflow's registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.distributed.world import World
from trainer.run.model_parts import OpenedModel
from trainer.run.saved import open_run
from trainer.serving.artefact.description import is_artefact
from trainer.serving.artefact.opening import open_artefact
from trainer.serving.check import check_place, is_address


def open_model(
    source: str | Path, world: World, overrides: Sequence[str] = (), trust_code: str | None = None
) -> OpenedModel:
    """The trained model at `source`: an artefact of `egmf export`, a run folder, or a registered version.

    A version, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``, is downloaded into a temporary folder, which is gone again when the model
    is open; the store is ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in ``runs`` or here.

    Every rank calls this.

    Args:
        overrides: ``dotted.key=value`` words that replace the config's.
        trust_code: the hash of Python code that the model would bring along, which its user has read.

    Raises:
        ValueError: there is no such model, or it cannot be opened; the message says why and what to do.
    """
    if is_address(source):
        from trainer.serving.mlflow_model.store import downloaded  # of MLflow, which takes seconds

        with downloaded(str(source)) as place:
            return open_model(place, world, overrides, trust_code)
    folder = Path(source)
    check_place(folder)
    if is_artefact(folder):
        return open_artefact(folder, world, overrides, trust_code)
    return open_run(folder, world, overrides, agreed=trust_code)
