"""Several questions about the same samples, such as valence, arousal and emotion: their definition, and the tasks of a run.

Each question is a :class:`trainer.tasks.Task` of its own, with its prompt, answers and metrics. What they have in common is the
dataset, which is prepared once under the name of all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from trainer.tasks import (
    BUILT_IN,
    NAME,
    Task,
    TaskError,
    define_task,
    get_task,
    is_task_file,
    read_task_file,
    select_by,
)

_KEYS = ("name", "questions")


class Questions(BaseModel):
    """What is asked of the samples of one dataset, in the order of the file; `name` is that of the dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=NAME)
    questions: tuple[Task, ...]

    @property
    def language(self) -> str:
        """That of the first question, in which files are read."""
        return self.questions[0].language


Definition: TypeAlias = Task | Questions


def questions_of(definition: Definition) -> tuple[Task, ...]:
    """The questions of a definition; a task is its own one question."""
    return definition.questions if isinstance(definition, Questions) else (definition,)


def get_definition(name: str, *, saved: bool = False) -> Definition:
    """A built-in task by name, or the task or questions that a YAML file defines; arguments and errors as of
    :func:`trainer.tasks.get_task`."""
    if not is_task_file(name):
        return get_task(name, saved=saved)
    return define(read_task_file(name), where=name, saved=saved, folder=Path(name).parent)


def define(raw: Any, where: str = "task", *, saved: bool = False, folder: Path = Path()) -> Definition:
    """A task, or several questions, from a plain mapping, such as a YAML file's or a dataset record's.

    Several questions are a mapping with `name` and `questions`, a list of at least two: mappings as of a task, names of built-in
    tasks, or YAML files of one task each, relative to `folder`.

    Raises:
        TaskError: all faults of all definitions.
    """
    if not isinstance(raw, dict) or "questions" not in raw:
        return define_task(raw, where=where, saved=saved)
    faults = [
        f"{key}: no such key beside questions{_near(str(key))}; it belongs to a question"
        for key in raw
        if key not in _KEYS
    ]
    name, listed = raw.get("name"), raw["questions"]
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        faults.append(f"name: must be letters, digits, - and _, not {name!r}: the dataset of all questions goes by it")
    if not isinstance(listed, (list, tuple)) or len(listed) < 2:
        faults.append(
            "questions: must be a list of at least two tasks; one question alone is written without questions:"
        )
        listed = []
    found: list[Task] = []
    for number, one in enumerate(listed, 1):
        try:
            found.append(_question(one, f"question {number}", saved=saved, folder=folder))
        except TaskError as error:
            known = one.get("name") if isinstance(one, dict) else one
            faults += [f"question {number} ({known}): {fault}" for fault in error.faults]
    names = [task.name for task in found]
    faults += [
        f"questions: {twice!r} is the name of several" for twice in dict.fromkeys(names) if names.count(twice) > 1
    ]
    if name in names:
        faults.append(f"name: {name!r} is a question's name too: choose another for all of them")
    if faults:
        lines = [f"{where}: {len(faults)} fault(s) in the definitions of the questions", *(f"  {f}" for f in faults)]
        raise TaskError("\n".join(lines), faults)
    return Questions(name=str(name), questions=tuple(found))


def _question(given: Any, where: str, *, saved: bool, folder: Path) -> Task:
    if not isinstance(given, str):
        return define_task(given, where=where, saved=saved)
    return get_task(str(folder / given) if is_task_file(given) else given, saved=saved)


def _near(key: str) -> str:
    close = difflib.get_close_matches(key, _KEYS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def is_built_in(task: Task) -> bool:
    """Whether it is a built-in task as it stands."""
    return BUILT_IN.get(task.name) == task


@dataclass(frozen=True)
class RunTask:
    """A task of a run: what the config calls it, and the name of its dataset, which is that of all questions where it is one of
    several."""

    task: Task
    requested: str
    dataset: str

    def path(self, template: str) -> str:
        """`data.path` of a config, with the dataset's name for ``{task}``."""
        return template.replace("{task}", self.dataset)


def find_run_tasks(names: Sequence[str], *, saved: bool = False) -> tuple[list[RunTask], list[str]]:
    """The tasks of a run by their names in a config, the questions of a file one by one; and what is wrong with the names.

    Args:
        names: as for :func:`get_definition`, with `saved`.
    """
    found: list[RunTask] = []
    faults = []
    sets: set[str] = set()
    for name in names:
        try:
            definition = get_definition(name, saved=saved)
        except TaskError as error:
            faults.append(str(error))
            continue
        found += [RunTask(task, name, definition.name) for task in questions_of(definition)]
        if isinstance(definition, Questions):
            sets.add(definition.name)
    taken = [one.task.name for one in found]
    for name in dict.fromkeys(taken):
        if taken.count(name) > 1:
            by = ", ".join(one.requested for one in found if one.task.name == name)
            faults.append(f"the run has several tasks of the name {name}: {by}")
    faults += [
        f"{name} is the name of a task and of a dataset of several questions in this run: rename one"
        for name in sets & {*taken}
    ]
    return found, faults


def tasks_of_run(names: Sequence[str], *, saved: bool = False) -> list[RunTask]:
    """:func:`find_run_tasks`, where nothing is wrong.

    Raises:
        TaskError: all that is.
    """
    found, faults = find_run_tasks(names, saved=saved)
    if faults:
        raise TaskError("\n".join(faults))
    return found


def get_tasks(names: Sequence[str], select: str | Mapping[str, str] = "", *, saved: bool = False) -> dict[str, Task]:
    """The tasks of a run by their names, each with the metric that the run's `eval.select` asks for.

    Args:
        names: as for :func:`tasks_of_run`, with `saved`.
        select: as for :func:`trainer.tasks.select_by`.

    Raises:
        TaskError: all that :func:`tasks_of_run` says; where that is nothing, all that :func:`trainer.tasks.select_by` says.
    """
    return select_by({one.task.name: one.task for one in tasks_of_run(names, saved=saved)}, select)
