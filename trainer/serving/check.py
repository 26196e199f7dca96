"""What can be said of a model's place before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.saved_config import saved_config
from trainer.serving.artefact.config import opened_config
from trainer.serving.artefact.description import is_artefact, read_description


def check_source(source: Path, overrides: Sequence[str] = ()) -> None:
    """Refuse a place that holds neither an exported model nor a run, and overrides that make no config of its own.

    Raises:
        ValueError: what is wrong.
    """
    if is_artefact(source):
        opened_config(source, read_description(source), overrides)
        return
    check_place(source)
    saved_config(source, overrides)


def check_place(source: Path) -> None:
    """Refuse a place that holds neither an exported model nor a run.

    Raises:
        ValueError: it does not.
    """
    if not is_artefact(source) and not (source / "config.yaml").is_file():
        raise ValueError(
            f"{source} is not a run folder: it has no config.yaml (egmf train writes one); nor is it an exported model, which has an egmf.json "
            "(egmf export writes one)"
        )


def refuse_artefact(source: Path, command: str) -> None:
    """Refuse an exported model where a run is needed.

    Raises:
        ValueError: it is one.
    """
    if is_artefact(source):
        name = read_description(source).run.name
        raise ValueError(
            f"{source} is an exported model, and {command} needs the run and its dataset: name the run folder ({name}); egmf predict answers "
            "samples with an exported model"
        )
