"""Names of the tags of a registered version, by which it is found and checked again."""

from __future__ import annotations

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
