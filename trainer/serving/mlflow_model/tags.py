"""Names that a registered version goes by: its model's, and those of its tags, by which it is found and checked again."""

from __future__ import annotations

import re

SEED = "egmf.seed"
STEP = "egmf.step"
RUN = "egmf.run"  # the name of the run's folder
ARTEFACT = "egmf.artefact"  # the hash of the exported folder
COMMIT = "git.commit"


def data_tag(task: str) -> str:
    """Of the fingerprint of a task's dataset; the run itself has the same tag."""
    return f"data.{task}"


def recipe_tag(task: str) -> str:
    """Of the hash of the recipe by which a task's features were extracted."""
    return f"recipe.{task}"


def metric_tag(split: str, task: str, metric: str) -> str:
    """Of a metric as it was when the version was registered."""
    return f"{split}/{task}/{metric}"


def validation_tag(task: str, metric: str) -> str:
    return metric_tag("valid", task, metric)


def check_name(name: str) -> None:
    """Refuse what MLflow does not take as the name of a registered model, and what would be an address.

    Raises:
        ValueError: it is such a name.
    """
    if not name.strip() or re.search(r"""[/:@"'.%\n]""", name):
        raise ValueError(
            f"{name!r} cannot name a registered model: choose one without / : @ . % and quotes, such as meld"
        )
