"""A comparison written to files, and logged to MLflow."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed.messages import join_truncated
from trainer.files import write_text
from trainer.results.compare import output
from trainer.results.compare.page import page
from trainer.results.compare.result import Comparison
from trainer.results.compare.sources.from_mlflow import KIND_TAG, connect, default_uri
from trainer.tracking.sqlite_uri import sqlite_file

DEFAULT_EXPERIMENT = "egmf"
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


@dataclass(frozen=True)
class Store:
    """Where a comparison is logged. `named`: the user named the store; else it is a file that was found, and so must its artifacts be."""

    uri: str
    experiment: str
    named: bool = True


def store_for(comparison: Comparison, named: str | None, folders: Sequence[Path]) -> Store | None:
    """The user's own store: the `named` one, that of MLFLOW_TRACKING_URI, or ``mlflow.db`` beside the folders or in ``runs``.

    What runs say of a store is not followed: a run folder may be somebody else's, and whoever is contacted is sent the user's token.
    None where there is none; a note of the comparison then says which store the runs name.
    """
    tracked = [run for group in comparison.groups for run in group.runs if run.mlflow]
    experiment = next((run.experiment for run in tracked if run.experiment), DEFAULT_EXPERIMENT)
    own = named or os.environ.get("MLFLOW_TRACKING_URI")
    if own:
        return Store(own, experiment)
    if not tracked:
        return None
    with contextlib.suppress(ValueError):
        return Store(default_uri([], folders), experiment, named=False)
    if elsewhere := {run.mlflow[0] for run in tracked if run.mlflow}:
        comparison.notes.append(
            f"not logged: the runs name the MLflow store {join_truncated(sorted(elsewhere))}, which is not followed; --log-to logs the "
            "comparison where it says"
        )
    return None


def log_comparison(comparison: Comparison, files: Sequence[Path], store: Store) -> str:
    """Log the files as artifacts of an MLflow run of their own, named compare, beside the runs; returns its id.

    Raises:
        ValueError: the store refuses them or cannot be reached.
    """
    uri, experiment = store.uri, store.experiment
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
        if entity is None and not store.named:
            raise ValueError(f"MLflow at {uri} has no experiment {experiment}")
        if entity is not None and not store.named and not _beside(entity.artifact_location, uri):
            raise ValueError(
                f"the experiment {experiment} of {uri} keeps its artifacts at {entity.artifact_location}, not beside the store: name "
                "the store with --log-to if they may be sent there"
            )
        experiment_id = client.create_experiment(experiment) if entity is None else entity.experiment_id
        run_id = client.create_run(experiment_id, tags=tags, run_name=NAME).info.run_id
        for path in files:
            client.log_artifact(run_id, str(path), NAME)
        client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        raise ValueError(f"the comparison cannot be logged to MLflow at {uri}: {str(error).splitlines()[0]}") from error
    return str(run_id)


def _beside(location: str, uri: str) -> bool:
    """Whether a folder of artifacts lies beside the SQLite file of a store, or below."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    if not location.startswith(("file:", "/")):
        return False
    path = Path(str(local_file_uri_to_path(location)))  # type: ignore[no-untyped-call]
    file = sqlite_file(uri)
    return file is not None and path.resolve().is_relative_to(file.resolve().parent)
