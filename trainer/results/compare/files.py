"""A comparison written to files, and logged to MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.files import write_text
from trainer.results.compare import output
from trainer.results.compare.from_mlflow import KIND_TAG, connect
from trainer.results.compare.page import page
from trainer.results.compare.result import Comparison

NAME = "compare"  # of the files, the MLflow run and the folder of its artifacts


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write ``compare.csv``, ``.json``, ``.tex`` and ``.html`` into `out`, each whole or not at all.

    Raises:
        ValueError: `out` cannot be written.
    """
    texts = {
        "csv": output.as_csv(comparison),
        "json": json.dumps(output.as_json(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "tex": output.as_tex(comparison),
        "html": page(comparison),
    }
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            path = out / f"{NAME}.{kind}"
            write_text(path, text)
            paths.append(path)
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}): choose another folder with --out") from error
    return paths


def store_of(comparison: Comparison) -> tuple[str, str] | None:
    """MLflow store and experiment of the first compared run that is in one; None where none is."""
    for group in comparison.groups:
        for run in group.runs:
            if run.mlflow and run.experiment:
                return run.mlflow[0], run.experiment
    return None


def log_comparison(comparison: Comparison, files: Sequence[Path], uri: str, experiment: str) -> str:
    """Log the files as artifacts of an MLflow run of their own, named compare, beside the runs; returns its id.

    Raises:
        ValueError: the store refuses them or cannot be reached.
    """
    client = connect(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.context.registry import resolve_tags

    tags = {
        **resolve_tags(),
        KIND_TAG: NAME,
        "egmf.split": comparison.split,
        "egmf.baseline": comparison.baseline or "each with each",
        "egmf.runs": " ".join(run.mlflow[1] for group in comparison.groups for run in group.runs if run.mlflow)[:5000],
    }
    try:
        entity = client.get_experiment_by_name(experiment)
        if entity is None:
            raise ValueError(f"MLflow at {uri} has no experiment {experiment}")
        run_id = client.create_run(entity.experiment_id, tags=tags, run_name=NAME).info.run_id
        for path in files:
            client.log_artifact(run_id, str(path), NAME)
        client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        raise ValueError(f"the comparison cannot be logged to MLflow at {uri}: {str(error).splitlines()[0]}") from error
    return str(run_id)
