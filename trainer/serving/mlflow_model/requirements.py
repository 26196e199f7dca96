"""What the MLflow model needs to be installed where it is loaded: the packages of this machine, pinned, and egmf-trainer itself.

egmf-trainer's code travels with the model unless a requirement is given that pip can install: a wheel that is on no index cannot be a
requirement, and the code that wrote an artefact is the code that surely reads it.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import trainer

DISTRIBUTION = "egmf-trainer"
TRAINING = frozenset({"deepspeed", "ninja", "matplotlib"})  # not imported to answer


def pinned(*, clips: bool = False) -> list[str]:
    """``name==version`` of every package that answering needs, as installed here; without local parts of versions (``+cpu``), which no index has.

    Args:
        clips: also those that extract features from clips.

    Raises:
        ValueError: egmf-trainer is not installed, so that its packages are not known.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{DISTRIBUTION} is not installed here, so what it needs is not known: pip install {DISTRIBUTION}"
        ) from error
    found = {}
    for line in lines:
        requirement = Requirement(line)
        extra = "clips" if clips else ""
        if requirement.name in TRAINING or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[requirement.name] = f"{requirement.name}=={Version(version).public}"
    return sorted(found.values(), key=str.lower)


def own_code(requirement: str | None) -> tuple[list[str], list[str]]:
    """How egmf-trainer gets there: folders of code that travel along, or lines for pip.

    Args:
        requirement: what pip installs it from, such as ``egmf-trainer==0.2`` or a wheel's address; None: its code travels along.

    Raises:
        ValueError: no requirement.
    """
    if requirement is None:
        return [str(Path(trainer.__file__).parent)], []
    try:
        Requirement(requirement)
    except ValueError as error:
        raise ValueError(f"{requirement!r} is not a requirement of pip: {error}") from error
    return [], [requirement]
