"""Several questions in one definition: what a YAML file may say, all faults at once, and the tasks of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.questions import Questions, define, find_run_tasks, get_definition, get_tasks, questions_of, tasks_of_run
from trainer.tasks import BUILT_IN, TaskError, define_task, get_task

VALENCE = {"name": "valence", "kind": "regression", "grid": {"low": 1, "high": 5, "step": 0.5}}
EMOTION = {"name": "emotion", "kind": "classification", "labels": ["joy", "anger"], "label_column": "emo"}


def write(path: Path, raw: Any) -> str:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


def test_questions_are_tasks_as_they_are_alone(tmp_path: Path) -> None:
    write(tmp_path / "emotion.yaml", EMOTION)
    path = write(tmp_path / "corpus.yaml", {"name": "corpus", "questions": [VALENCE, "meld", "emotion.yaml"]})
    found = get_definition(path)
    assert isinstance(found, Questions)
    assert found.questions == (define_task(VALENCE), BUILT_IN["meld"], define_task(EMOTION))
    assert questions_of(found) == found.questions
    assert questions_of(BUILT_IN["meld"]) == (BUILT_IN["meld"],)
    assert define(found.model_dump(mode="json"), saved=True) == found  # as a dataset's record has it
    assert get_definition("meld") is BUILT_IN["meld"]


def test_the_example_of_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
    block = text.split("<!-- tests/test_questions.py reads this one -->\n```yaml\n")[1].split("```")[0]
    found = define(yaml.safe_load(block))
    assert isinstance(found, Questions)
    assert [task.name for task in found.questions] == ["valence", "arousal", "emotion"]
    assert found.questions[0].select == "ccc"


def test_all_faults_of_all_questions_come_at_once() -> None:
    wrong = {"name": "ar ousal", "kind": "regression", "grid": {"low": 5, "high": 1}}
    listed = [VALENCE, VALENCE, wrong, "mled", {"kind": "classification", "labels": ["a"]}, 3]
    with pytest.raises(TaskError) as caught:
        define({"name": "valence", "questions": listed, "nam": 1}, where="c.yaml")
    text = str(caught.value)
    assert "c.yaml: 8 fault(s) in the definitions of the questions" in text
    for part in (
        "nam: no such key beside questions (did you mean name?)",
        "question 3 (ar ousal): name: String should match pattern",
        "question 3 (ar ousal): grid",
        "question 4 (mled): unknown task 'mled'; did you mean meld?",
        "question 5 (None): name: Field required",
        "question 6 (3): question 6 must hold a mapping",
        "questions: 'valence' is the name of several",
        "name: 'valence' is a question's name too",
    ):
        assert part in text, part


@pytest.mark.parametrize("listed", [[VALENCE], "meld", None, []])
def test_at_least_two_questions(listed: Any) -> None:
    with pytest.raises(TaskError, match="a list of at least two tasks"):
        define({"name": "c", "questions": listed})


def test_questions_inside_questions_and_in_place_of_a_task_are_refused(tmp_path: Path) -> None:
    inner = {"name": "inner", "questions": [VALENCE, EMOTION]}
    with pytest.raises(TaskError, match="question 1 asks several questions, and one task is needed here"):
        define({"name": "outer", "questions": [inner, "meld"]})
    with pytest.raises(TaskError, match="asks several questions, and one task is needed here"):
        get_task(write(tmp_path / "c.yaml", inner))


def test_the_tasks_of_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.yaml", {"name": "corpus", "questions": [VALENCE, EMOTION]})
    alone = write(tmp_path / "valence.yaml", VALENCE)
    found = tasks_of_run([path, "meld"])
    assert [(one.task.name, one.dataset, one.path("data/{task}")) for one in found] == [
        ("valence", "corpus", "data/corpus"), ("emotion", "corpus", "data/corpus"), ("meld", "meld", "data/meld"),
    ]  # fmt: skip
    assert tasks_of_run([alone])[0].path("data/{task}") == "data/valence"
    assert get_tasks([path], {"emotion": "uar"})["emotion"].select == "uar"
    with pytest.raises(
        TaskError, match=r"the run has several tasks of the name valence: .*corpus.yaml, .*valence.yaml"
    ):
        tasks_of_run([path, alone])
    other = write(tmp_path / "other.yaml", {**EMOTION, "name": "corpus"})
    assert "corpus is the name of a task and of a dataset" in find_run_tasks([path, other])[1][0]
