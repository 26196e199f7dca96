"""The pyfunc: a table of samples in, a table of predictions out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from trainer.serving.mlflow_model.schema import (
    FAULTY,
    FILES,
    REFUSE,
    REPORT,
    TASK,
    answer_table,
    faults_text,
    numbers_alone,
    samples_of,
)

if TYPE_CHECKING:
    from trainer.serving.predictor import Predictor

ARTEFACT = "egmf"  # the name of the exported folder inside the MLflow model
# What whoever loads the model may set, with the values where they do not: `files` is the folder in which feature files and clips may
# lie that samples name ("": none may), the others are those of Predictor.load.
CONFIG = {"files": "", "device": "auto", "dtype": "", "quantization": "", "trust_code": ""}


class EmotionModel(PythonModel):
    """Answers samples by :class:`trainer.serving.predictor.Predictor`.

    Parameters of a call: `task` is that of samples that name none; `faulty` says what becomes of samples that cannot be answered:
    ``refuse`` the call, naming all of them, or ``report`` each in the column `fault`, so that there is a row for every sample.
    """

    _predictor: Predictor

    def load_context(self, context: PythonModelContext) -> None:
        """Open the artefact, with the model's configuration (:data:`CONFIG`)."""
        from trainer.serving.predictor import Predictor

        config = {**CONFIG, **(context.model_config or {})}
        self._files = Path(config["files"]).resolve() if config["files"] else None
        self._predictor = Predictor.load(
            context.artifacts[ARTEFACT],
            device=config["device"],
            dtype=config["dtype"] or None,
            quantization=config["quantization"] or None,
            trust_code=config["trust_code"] or None,
        )

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row for each question asked of each sample, in order.

        Raises:
            MlflowException: samples that cannot be answered, all in one message, unless `faulty` is ``report``.
        """
        from trainer.serving.predictor import Prepared, Rejected

        task, faulty = _parameters(params or {})
        samples = samples_of(model_input)
        places = [self._file_faults(sample) for sample in samples]
        try:
            prepared = self._predictor.prepare(
                [sample for sample, faults in zip(samples, places, strict=True) if not faults], task=task
            )
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        waiting = iter(prepared)
        read: list[Prepared | Rejected] = [
            Rejected(id=str(sample.get("id", "")), where=f"sample {i}", faults=tuple(faults))
            if faults
            else next(waiting)
            for i, (sample, faults) in enumerate(zip(samples, places, strict=True), 1)
        ]
        bad = [one for one in read if isinstance(one, Rejected)]
        if bad and faulty == REFUSE:
            lines = [f"{one.where}: {faults_text(one.faults)}" for one in bad]
            raise MlflowException.invalid_parameter_value(
                "\n  ".join(
                    [f"{len(bad)} of {len(read)} samples cannot be answered (faulty=report answers the others)", *lines]
                )
            )
        good = [one for one in read if not isinstance(one, Rejected)]
        answers = iter(self._predictor.answer(good))
        rows: list[Mapping[str, Any]] = []
        for one in read:
            if isinstance(one, Rejected):
                rows.append({"id": one.id, "task": "", "valid": False, "fault": faults_text(one.faults)})
            else:
                for _ in one.tasks:
                    found = next(answers)
                    rows.append({**found.plain(), "probabilities": found.probabilities})
        return answer_table(rows, numbers=numbers_alone(self._predictor.tasks))

    def _file_faults(self, sample: dict[str, Any]) -> list[str]:
        """Faults of the files that a sample names, whose paths are made absolute: only those in the folder `files` are read."""
        faults = []
        for name in FILES:
            value = sample.get(name)
            if not isinstance(value, str):
                continue
            if self._files is None:
                faults.append(
                    f"{name}: names a file, and this model reads none; load it with model_config={{'files': FOLDER}} to allow those in a folder"
                )
                continue
            path = (self._files / value).resolve()
            if path.is_relative_to(self._files):
                sample[name] = str(path)
            else:
                faults.append(f"{name}: {value} does not lie in the folder whose files this model reads")
        return faults


def _parameters(params: Mapping[str, Any]) -> tuple[str | None, str]:
    faulty = params.get(FAULTY) or REFUSE
    if faulty not in (REFUSE, REPORT):
        raise MlflowException.invalid_parameter_value(f"{FAULTY} is {REFUSE} or {REPORT}, not {faulty!r}")
    return params.get(TASK) or None, str(faulty)
