"""What a run tells: MLflow on rank 0. Nothing here changes the training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, flatten

log = logging.getLogger(__name__)

PARAMETER_LIMIT = 6000  # characters of a parameter's value that every MLflow store takes
BATCH = 100  # parameters of one request


class Tracker:
    """The run's record in MLflow; with ``track.mlflow: false``, or on other ranks than 0, it does nothing.

    The default store is an SQLite file, ``mlflow.db``, beside the run folder, with artifacts in ``mlartifacts``.
    """

    def __init__(self, config: RunConfig, out: Path, *, enabled: bool, run_id: str | None = None) -> None:
        self.enabled = enabled and config.track.mlflow
        self.run_id: str | None = run_id
        self.uri = config.track.uri or f"sqlite:///{out.resolve().parent / 'mlflow.db'}"
        if not self.enabled:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        self._mlflow = mlflow
        track = config.track
        try:
            mlflow.set_tracking_uri(self.uri)
            if mlflow.get_experiment_by_name(track.experiment) is None:
                local = self.uri.startswith("sqlite:///")
                mlflow.create_experiment(
                    track.experiment, (out.resolve().parent / "mlartifacts").as_uri() if local else None
                )
            mlflow.set_experiment(track.experiment)
            run = mlflow.start_run(
                run_id=run_id,
                run_name=None if run_id else track.run_name or out.name,
                log_system_metrics=track.system_metrics,
            )
        except Exception as error:
            raise ValueError(
                f"MLflow at {self.uri} (track.uri) does not answer: {error}; start the server, or set track.mlflow=false"
            ) from error
        self.run_id = str(run.info.run_id)

    def start(self, config: RunConfig, tags: dict[str, Any]) -> None:
        """The resolved config as parameters (long ones cut, and said so) and `tags`."""
        if not self.enabled or self.run_id is None:
            return
        shown = {key: _shorten(key, value) for key, value in flatten(config).items()}
        known = self._mlflow.MlflowClient().get_run(self.run_id).data.params
        fresh = [(key, value) for key, value in shown.items() if key not in known]
        for start in range(0, len(fresh), BATCH):
            self._mlflow.log_params(dict(fresh[start : start + BATCH]))
        self._mlflow.set_tags({key: str(value) for key, value in {**tags, **config.track.tags}.items()})

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers at `step`; what is undefined is left out."""
        defined = {key: float(value) for key, value in values.items() if value is not None}
        if self.enabled and defined:
            self._mlflow.log_metrics(defined, step=step, synchronous=False)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if self.enabled and path.exists():
            self._mlflow.log_artifact(str(path), folder)

    def finish(self, state: str) -> None:
        """End the record: state is that of run.json."""
        if self.enabled:
            self._mlflow.flush_async_logging()
            self._mlflow.end_run({"done": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))
            self.enabled = False


def _shorten(key: str, value: Any) -> str:
    text = str(value)
    if len(text) > PARAMETER_LIMIT:
        log.warning("parameter %s is cut to %d characters in MLflow; config.yaml has it whole", key, PARAMETER_LIMIT)
        text = text[: PARAMETER_LIMIT - 1] + "…"
    return text
