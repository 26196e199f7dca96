"""The tasks of a run that was trained before, also where the YAML files that define them are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.data.preparation.folder import read_record
from trainer.data.preparation.record import DatasetRecord, QuestionStatistics, SplitStatistics
from trainer.questions import RunTask, define, get_definition, questions_of
from trainer.tasks import Task, TaskError


def find_saved_tasks(
    names: Sequence[str], data_path: str, fingerprints: Mapping[str, object]
) -> tuple[list[RunTask], dict[str, TaskError]]:
    """The tasks by their names in a run's config; and those names that lead nowhere, with the reason.

    One whose YAML file is gone is read from the record of its dataset, if that is the run's own.

    Args:
        data_path: of the config, with ``{task}`` in it.
        fingerprints: task -> fingerprint of the data that the run was trained on.
    """
    found, lost = [], {}
    for name in names:
        try:
            definition = get_definition(name, saved=True)
            found += [RunTask(task, name, definition.name) for task in questions_of(definition)]
        except TaskError as error:
            stem = Path(name).stem
            record = read_record(Path(data_path.replace("{task}", stem)))
            asked = [] if record is None else list(prepared_tasks(record).values())
            own = [task for task in asked if record and fingerprints.get(task.name) == record["fingerprint"]]
            chosen = [task for task in own if task.name == stem] or own
            found += [RunTask(task, name, stem) for task in chosen]
            if not chosen:
                lost[name] = error
    return found, lost


def prepared_tasks(record: DatasetRecord) -> dict[str, Task]:
    """The tasks that a dataset was prepared for, by name: one, or several questions."""
    return {task.name: task for task in questions_of(define(record["task"], saved=True))}


def answers_of_split(record: DatasetRecord, split: str, task: str) -> SplitStatistics | QuestionStatistics | None:
    """What a dataset's record says of the answers to a task in a split; None where it has no such split."""
    entry = record["splits"].get(split)
    return None if entry is None else entry.get("questions", {}).get(task, entry)
