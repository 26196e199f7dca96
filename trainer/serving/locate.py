"""From what a user names, a run folder for one, to an opened model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.distributed.world import World
from trainer.run.model_parts import OpenedModel
from trainer.run.saved import open_run


def open_model(
    source: str | Path, world: World, overrides: Sequence[str] = (), trust_code: str | None = None
) -> OpenedModel:
    """The model that `source` names.

    Args:
        overrides: settings of its config, such as ``eval.tokens=2048``.
        trust_code: the hash of Python code that it would bring along, see :func:`trainer.trust.check_trust`.

    Raises:
        ValueError: nothing that can be opened.
    """
    return open_run(Path(source), world, overrides, agreed=trust_code)
