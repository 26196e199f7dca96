"""The user's MLflow store, and a registered version downloaded from it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.results.compare.sources.from_mlflow import connect
from trainer.tracking.sqlite_uri import sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "models:/"
_ID = re.compile(r"m-[0-9a-f]{32}")


def registry_uri(named: str | None = None, folders: Sequence[Path] = ()) -> str:
    """The user's MLflow store: the `named` one, that of ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` beside the folders, in ``runs`` or here.

    Raises:
        ValueError: there is none.
    """
    own = named or os.environ.get("MLFLOW_TRACKING_URI")
    if own:
        return own
    for place in [*(p for f in folders for p in (f, f.resolve().parent)), Path("runs"), Path()]:
        if (place / "mlflow.db").is_file():
            return sqlite_uri((place / "mlflow.db").resolve())
    raise ValueError(
        "there is no MLflow store: set MLFLOW_TRACKING_URI, or name one with --uri, such as sqlite:///runs/mlflow.db or http://host:5000"
    )


@contextlib.contextmanager
def downloaded(address: str, uri: str | None = None) -> Iterator[Path]:
    """The artefact's folder of a registered version, downloaded by MLflow; it is gone after the block.

    Args:
        address: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or ``models:/m-…``, the id of a logged model.
        uri: as of :func:`registry_uri`.

    Raises:
        ValueError: no such version, one that egmf-trainer did not log, or a store that cannot be read.
    """
    place = registry_uri(uri)
    client = connect(place)
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    from trainer.serving.mlflow_model.model import ARTEFACT

    with tempfile.TemporaryDirectory(prefix="egmf-mlflow-") as scratch:
        try:
            source = _location(client, address)
            folder = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{source.rstrip('/')}/artifacts/{ARTEFACT}", dst_path=scratch, tracking_uri=place
            )
        except (MlflowException, OSError) as error:
            raise ValueError(
                f"{address} cannot be read from MLflow at {place}: {str(error).splitlines()[0]}"
            ) from error
        if not Path(folder).is_dir():
            raise ValueError(
                f"{address} of MLflow at {place} holds no artefact of egmf-trainer: egmf export RUN --mlflow NAME registers one"
            )
        yield Path(folder)


def _location(client: MlflowClient, address: str) -> str:
    """Where the files of a version lie.

    Raises:
        ValueError: an address of another form.
    """
    rest = address.removeprefix(PREFIX)
    if _ID.fullmatch(rest):
        return str(client.get_logged_model(rest).artifact_location)
    alias = re.fullmatch(r"([^/@:]+)@([^/@:]+)", rest)
    if alias is not None:
        version = client.get_model_version_by_alias(alias[1], alias[2]).version
        return str(client.get_model_version_download_uri(alias[1], str(version)))
    plain = re.fullmatch(r"([^/@:]+)/(\d+)", rest)
    if not address.startswith(PREFIX) or plain is None:
        raise ValueError(f"{address!r} is no address of a model: write models:/NAME/VERSION or models:/NAME@ALIAS")
    return str(client.get_model_version_download_uri(plain[1], plain[2]))
