"""The pyfunc: a table of samples in, a table of predictions out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from trainer.serving.given import samples_in
from trainer.serving.mlflow_model.schema import (
    FAULTY,
    FILES,
    REFUSE,
    REPORT,
    TASK,
    answer_table,
    numbers_alone,
)
from trainer.serving.prediction import Prepared, Rejected, SampleError

if TYPE_CHECKING:
    from trainer.serving.predictor import Predictor

ARTEFACT = "egmf"  # the name of the exported folder inside the MLflow model
# What whoever loads the model may set, with the values where they do not: `files` is the folder in which feature files and clips may
# lie that samples name ("": none may), `base` where a local base model lies now; the others are those of Predictor.load.
CONFIG = {"files": "", "device": "auto", "dtype": "", "quantization": "", "base": "", "trust_code": ""}


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
            overrides=[f"model.backbone.name={config['base']}"] if config["base"] else [],
        )

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row for each question asked of each sample, in order.

        Raises:
            MlflowException: samples that cannot be answered, all in one message, unless `faulty` is ``report``.
        """
        task, faulty = _parameters(params or {})
        read = self._read(list(samples_in(model_input)), task)
        bad = [one for one in read if isinstance(one, Rejected)]
        if bad and faulty == REFUSE:
            raise MlflowException.invalid_parameter_value(
                f"{SampleError(bad, len(read))}\nWith the parameter {FAULTY}={REPORT!r} the others are answered"
            )
        answers = iter(self._predictor.answer([one for one in read if isinstance(one, Prepared)]))
        rows: list[Mapping[str, Any]] = []
        for one in read:
            if isinstance(one, Rejected):
                rows.append({"id": one.id, "task": "", "valid": False, "fault": "; ".join(one.faults)})
            else:
                rows += [next(answers).plain() for _ in one.tasks]
        return answer_table(rows, numbers=numbers_alone(self._predictor.tasks))

    def _read(self, samples: list[dict[str, Any]], task: str | None) -> list[Prepared | Rejected]:
        """Every sample, checked and read; those that name files which may not be read are among the rejected."""
        forbidden = [self._files_of(sample) for sample in samples]
        try:
            found = self._predictor.prepare(map(_as_json_has_it, samples), task=task)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        read: list[Prepared | Rejected] = []
        for place, (one, sample, faults) in enumerate(zip(found, samples, forbidden, strict=True)):
            own = [*faults] or (list(one.faults) if isinstance(one, Rejected) else [])
            given = sample.get("id")  # the checks tell none of a sample of which they cannot read the keys
            id = one.id or (str(given) if isinstance(given, (str, int)) else "")
            read.append(Rejected(id, f"samples[{place}]", tuple(own)) if own else one)
        return read

    def _files_of(self, sample: dict[str, Any]) -> list[str]:
        """Make the paths of a sample absolute, and take away, with the reason, those that do not lie in the folder `files`."""
        faults = []
        for name in FILES:
            value = sample.get(name)
            if not isinstance(value, str):
                continue
            path = None if self._files is None else (self._files / value).resolve()
            if self._files is not None and path is not None and path.is_relative_to(self._files):
                sample[name] = str(path)
                continue
            del sample[name]
            faults.append(
                f"{name}: names a file, and this model reads none; whoever loads it can allow those in a folder "
                "(model_config={'files': FOLDER})"
                if path is None
                else f"{name}: {value} does not lie in the folder whose files this model reads"
            )
        return faults


def _as_json_has_it(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with `rate` as a mapping, of which Spark makes a row or pairs."""
    rate = sample.get("rate")
    if rate is None or isinstance(rate, str):
        return sample
    try:
        pairs = rate.asDict() if hasattr(rate, "asDict") else dict(rate)
    except (TypeError, ValueError):
        return sample  # for the checks to name
    return {**sample, "rate": {key: value for key, value in pairs.items() if value is not None}}


def _parameters(params: Mapping[str, Any]) -> tuple[str | None, str]:
    faulty = params.get(FAULTY) or REFUSE
    if faulty not in (REFUSE, REPORT):
        raise MlflowException.invalid_parameter_value(f"{FAULTY} is {REFUSE} or {REPORT}, not {faulty!r}")
    return params.get(TASK) or None, str(faulty)
