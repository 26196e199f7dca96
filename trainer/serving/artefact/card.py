"""The model card of an artefact, in the form that hubs read, and the note on licences.

Every number is the run's own: of `metrics.json`, with an interval from `predictions/` where these are there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.answers.metrics import metric_of
from trainer.answers.scores import metric_value
from trainer.features.recipe_record import RecipeRecord, name_of
from trainer.files import write_text
from trainer.results.compare.sources.compared_run import Answers, read_answers
from trainer.results.compare.statistics import DEFINED, resample_counts
from trainer.results.printable import format_metric
from trainer.results.run_folder import PREDICTIONS, RunFolder, read_run
from trainer.serving.artefact.description import CARD, LICENSE, Description, TaskEntry
from trainer.tasks import Task, define_task

log = logging.getLogger(__name__)

RESAMPLES, LEVEL = 1000, 0.95
SPLITS = ("test", "valid")


@dataclass(frozen=True)
class CardMetric:
    """A metric of a task on a split with its interval over samples; None where undefined, or where there are no predictions."""

    task: str
    split: str
    n: int
    name: str
    selects: bool
    value: float | None
    low: float | None
    high: float | None

    @property
    def shown(self) -> str:
        """The value and its interval, as a cell of a table."""
        value = format_metric(self.value)
        if self.low is None or self.high is None:
            return value
        return f"{value} [{format_metric(self.low)}, {format_metric(self.high)}]"


def write_card(out: Path, description: Description, run: Path, doubts: Sequence[str] = ()) -> None:
    """Write `README.md`; `doubts` are what was exported although it looks wrong."""
    tasks = {name: define_task(entry.definition, saved=True) for name, entry in description.tasks.items()}
    metrics = card_metrics(read_run(run, predictions=False), tasks)
    text = _page().render(
        front=_front_matter(description, tasks, metrics).to_yaml(line_break="\n"),
        d=description,
        tasks=tasks,
        metrics=metrics,
        doubts=doubts,
        level=f"{LEVEL:.0%}",
        recipes={name: _recipe(entry) for name, entry in description.tasks.items()},
        streams={name: _streams(entry) for name, entry in description.tasks.items()},
        base=_base(description),
        example=_example(next(iter(description.tasks)), len(description.tasks) > 1),
    )
    write_text(out / CARD, text.rstrip() + "\n")


def write_license(out: Path, description: Description) -> None:
    """Write `LICENSE`: what the weights are derived from, whose licences they stand under."""
    text = _environment().get_template("license.j2").render(d=description, base=_base(description))
    write_text(out / LICENSE, text.rstrip() + "\n")


def card_metrics(run: RunFolder, tasks: dict[str, Task]) -> list[CardMetric]:
    """Every metric of every task on test and validation, as the run has it."""
    found = []
    for split in SPLITS:
        answers = _answers(run.path, split, tasks)
        for name, task in tasks.items():
            scores = run.results.get(split, {}).get(name)
            if scores is None:
                continue
            counts_BN = None
            if name in answers:
                counts_BN = resample_counts(len(answers[name].ids_N), RESAMPLES, np.random.default_rng(0))
            for key in task.metrics:
                low = high = None
                value = metric_value(scores, key)
                if counts_BN is not None and value is not None:
                    low, high = interval(task, key, answers[name], counts_BN)
                found.append(CardMetric(name, split, int(scores["n"]), key, key == task.select, value, low, high))
    return found


def interval(task: Task, key: str, answers: Answers, counts_BN: np.ndarray) -> tuple[float | None, float | None]:
    """The percentile interval of a metric over resampled samples; of none where it is undefined in too many of them."""
    resampled_B = metric_of(task, key, answers.truth_N, answers.guess_N).weighted(counts_BN)
    defined_B = resampled_B[np.isfinite(resampled_B)]
    if len(defined_B) < DEFINED * len(resampled_B):
        return None, None
    low, high = np.quantile(defined_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _answers(run: Path, split: str, tasks: dict[str, Task]) -> dict[str, Answers]:
    path = run / PREDICTIONS / f"{split}.parquet"
    if not path.is_file():
        return {}
    try:
        return read_answers(path, tasks)
    except ValueError as error:
        log.warning("the card has no intervals of %s: %s", split, error)
        return {}


def _front_matter(description: Description, tasks: dict[str, Task], metrics: Sequence[CardMetric]) -> ModelCardData:
    languages = list(dict.fromkeys(task.language for task in tasks.values()))
    results = [
        EvalResult(
            task_type="text-classification",
            task_name=f"multimodal {tasks[one.task].kind}",
            dataset_type=one.task,
            dataset_name=one.task,
            dataset_split=one.split,
            metric_type=one.name,
            metric_name=one.name,
            metric_value=one.value,
        )
        for one in metrics
        if one.value is not None and one.split == "test" and one.selects
    ]
    hub = description.base.place == "hub"
    known: dict[str, Any] = {"base_model": description.base.name, "base_model_relation": "adapter"} if hub else {}
    return ModelCardData(
        language=languages if len(languages) > 1 else languages[0],
        license="other",
        license_name="see-license",
        license_link=LICENSE,
        library_name="peft" if description.adapter.kind == "lora" else "egmf-trainer",
        tags=["egmf", "emotion-recognition", "multimodal", "audio", "video"],
        model_name=description.run.name,
        eval_results=results or None,
        **known,
    )


def _base(description: Description) -> str:
    """The backbone in words."""
    base = description.base
    if base.name == "tiny":
        return "the offline backbone of egmf-trainer: random weights and a tokenizer of the training texts, in `base/`"
    at = f" at revision `{base.revision}`" if base.revision else ""
    if base.place == "folder" or Path(base.name).is_absolute():
        return f"the model in the folder `{Path(base.name).name}` of the machine that trained"
    return f"`{base.name}`{at}"


def _recipe(entry: TaskEntry) -> str:
    if entry.recipe is None:
        return "not known: features must be those of the training data"
    record: RecipeRecord = entry.recipe  # type: ignore[assignment]  # as it was written
    return name_of(record)


def _streams(entry: TaskEntry) -> list[str]:
    """What the model reads of each modality, in words."""
    words = []
    for name, width in entry.widths.items():
        if width:
            rate = entry.rates.get(name)
            words.append(f"{name}: {width} features a frame" + (f", {rate:g} frames a second" if rate else ""))
    return words


def _example(task: str, several: bool) -> str:
    named = f', "task": "{task}"' if several else ""
    return f'{{"id": "1", "text": "I did not expect that."{named}}}'


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("trainer.serving.artefact", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown and plain text
    )


def _page() -> Any:
    return _environment().get_template("card.md.j2")
