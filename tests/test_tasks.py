"""Definitions of tasks: which metrics a task gets by default, what is refused and with which advice, what still opens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from tests.data.test_own_samples import write_lines
from tests.distributed.processes import ROOT
from trainer.answers.metrics import compute
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare
from trainer.metric_table import FAMILIES
from trainer.questions import get_tasks
from trainer.tasks import BUILT_IN, MOST_NUMBERS, Task, TaskError, define_task, get_task, select_by


def regression(low: float, high: float, step: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"name": "own", "kind": "regression", "grid": {"low": low, "high": high, "step": step}, **more}


def words(**more: Any) -> dict[str, Any]:
    return {"name": "own", "kind": "classification", "labels": ["joy", "anger", "sad"], **more}


def faults(raw: Any) -> str:
    with pytest.raises(TaskError) as error:
        define_task(raw)
    return str(error.value)


# ---- defaults


@pytest.mark.parametrize(
    ("low", "high", "family", "select"),
    [
        *((-3, 3, "mosei", "non0_f1"), (-1, 1, "mosei", "non0_f1"), (-0.5, 2, "mosei", "non0_f1")),
        *(
            (1, 5, "regression", "ccc"),
            (0, 1, "regression", "ccc"),
            (-5, 0, "regression", "ccc"),
            (-5, -1, "regression", "ccc"),
        ),
    ],
)
def test_the_family_follows_the_numbers(low: float, high: float, family: str, select: str) -> None:
    task = define_task(regression(low, high))
    assert (task.family, task.select) == (family, select)
    assert define_task(task.model_dump(mode="json"), saved=True) == task  # as a dataset's record has it


def test_classification_selects_by_any_name_of_its_metrics() -> None:
    assert define_task(words()).select == "wf1"
    assert [define_task(words(select=name)).select for name in ("uar", "ua", "wa", "acc")] == [
        "uar",
        "uar",
        "acc",
        "acc",
    ]
    assert define_task(regression(1, 5, 0.5, select="corr")).select == "corr"
    assert not define_task(regression(1, 5, select="rmse")).greater_is_better


def test_the_file_of_the_documentation_is_a_task(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"tests/test_tasks.py reads this one -->\n```yaml\n(name: .*?)```", page, re.S)
    (tmp_path / "arousal.yaml").write_text(block, encoding="utf-8")
    task = get_task(str(tmp_path / "arousal.yaml"))
    assert set(yaml.safe_load(block)) | {"labels"} == set(Task.model_fields)
    assert task.instruction().endswith("calm to aroused: 1.00 … 5.00.")
    assert task.answers()[1] == "1.25"
    defaults = {**yaml.safe_load(block), "family": None, "select": None}
    assert define_task({key: value for key, value in defaults.items() if value}) == task
    for key in Task.model_fields:
        assert f"| `{key}` | " in page


# ---- refusals


@pytest.mark.parametrize("family", ["mosei", "sims"])
@pytest.mark.parametrize(("low", "high"), [(1, 5), (0, 1), (-1, 0)])
def test_a_family_of_signs_is_refused_without_two_signs(family: str, low: float, high: float) -> None:
    text = faults(regression(low, high, family=family))
    assert f"family: '{family}' is not for the grid {low:.1f} … {high:.1f}" in text
    assert "both sides of 0" in text
    assert "Write family: regression (ccc, corr, mae, rmse, r2)" in text


def test_a_family_that_clips_is_refused_beyond() -> None:
    assert "clips all numbers to ±1" in faults(regression(-3, 3, family="sims"))
    assert define_task(regression(-0.5, 1, family="sims")).undefined.keys() == {"acc3", "acc5"}


def test_classes_of_another_range_cannot_select() -> None:
    assert define_task(regression(-3, 3)).undefined == {}
    assert define_task(regression(-2, 2)).undefined.keys() == {"acc7"}
    assert define_task(regression(-1, 1)).undefined.keys() == {"acc7", "acc5"}
    assert "acc7 is undefined on the numbers of own: its classes are those of −3 … 3" in faults(
        regression(-1, 1, select="acc7")
    )


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        (words(select="uaar"), ["did you mean uar?", "acc, wa, wf1"]),
        (words(select="ccc"), ["none of the metrics of family 'emotion'"]),
        (regression(-1, 1, select="ccc"), ["'ccc' is none of the metrics of family 'mosei'", "family 'regression' has it"]),
        (regression(1, 5, select="non0_f1"), ["family 'regression'", "family 'mosei' has it, which is not for this grid: its accuracies"]),
        (words(select="uaar", language="zh", prompts={"en": {"instruction": "?", "cue": ":"}}),
         ["did you mean uar?", "no prompt in the task's language 'zh'"]),
        (words(labels=["a"], select="x"), ["at least two different labels", "'x' is none of the metrics"]),
        (words(labels=[0, 1, True]), ["labels.0: Input should be a valid string, and is read as int 0: put the label in quotes",
                                      "labels.2: Input should be a valid string, and is read as bool True"]),
        (regression(0, 100, 0.01), ["10001 numbers", f"at most {MOST_NUMBERS}", "greater step"]),
        (regression(0, 1, 1 / 3), ["grid: grid step=0.3333333333333333 needs more than 6 decimals"]),
        (regression(1, 5, family="moseii"), ["metrics family 'mosei' or 'sims' or 'regression'"]),
        (regression(1, 5, 0.001, family="mosei"), ["2 fault(s)", "both sides of 0", "4001 numbers"]),
    ],
)  # fmt: skip
def test_a_fault_says_what_to_do(raw: dict[str, Any], messages: list[str]) -> None:
    text = faults(raw)
    for message in messages:
        assert message in text


def test_labels_that_are_numbers_say_what_to_do(tmp_path: Path) -> None:
    lines = [
        {"id": f"{s}{i}", "text": "t", "label": i, "split": s} for s in ("train", "valid", "test") for i in range(3)
    ]
    source = write_lines(tmp_path / "int.jsonl", *lines)
    with pytest.raises(
        DataError, match=r"'0' \(a number, but labels are words: write 'joy' or another, or have the task list '0'\)"
    ):
        prepare(define_task(words()), [source], tmp_path / "words")
    numbers = define_task(words(labels=["0", "1", "2"]))  # as the message says
    assert prepare(numbers, [source], tmp_path / "numbers").record["splits"]["train"]["labels"] == {
        "0": 1,
        "1": 1,
        "2": 1,
    }


# ---- what older versions made


@pytest.mark.parametrize("select", ["non0_f1", "has0_acc", "mae"])
def test_an_older_task_of_signs_still_opens_and_its_signs_are_undefined(select: str, tmp_path: Path) -> None:
    raw = regression(1, 5, 0.5, family="mosei", select=select)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(TaskError, match="family: regression"):
        get_task(str(tmp_path / "own.yaml"))
    task = get_task(str(tmp_path / "own.yaml"), saved=True)
    assert (task.family, task.select) == ("mosei", select)
    got = compute(task, [1.0, 2.0, 4.5], [1.5, 2.0, None])
    for key in ("has0_acc", "has0_f1", "non0_acc", "non0_f1", "acc7", "acc5"):
        assert got[key] is None
    assert got["mae"] == 0.25
    json.dumps(got, allow_nan=False)


def test_an_older_file_that_named_no_family_keeps_its_metric() -> None:
    raw = regression(1, 5, select="acc7")
    assert define_task(raw, saved=True).family == "mosei"
    assert define_task(regression(1, 5), saved=True).family == "regression"
    assert define_task(regression(0, 300), saved=True).grid.size == 3001  # type: ignore[union-attr]


def test_an_older_task_that_was_clipped_has_only_signs() -> None:
    task = define_task(regression(-3, 3, family="sims"), saved=True)
    assert [key for key in task.metrics if key not in task.undefined] == ["acc2", "f1", "weak_acc2"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_metric_of_a_built_in_task_is_defined(name: str) -> None:
    task = BUILT_IN[name]
    assert task.undefined == {}
    assert define_task(task.model_dump(mode="json")) == task


# ---- the metrics of any numbers


def test_the_generic_family_equals_the_libraries_on_any_numbers() -> None:
    rng = np.random.default_rng(0)
    task = define_task(regression(0, 100, 5))
    truth = rng.uniform(0, 100, 200)
    guess = truth + rng.normal(5, 20, 200)
    got = compute(task, truth, guess)
    assert list(got) == ["n", "invalid_rate", "ccc", "corr", "mae", "rmse", "r2"]
    assert got["corr"] == pearsonr(truth, guess).statistic
    assert got["mae"] == mean_absolute_error(truth, guess)
    assert got["rmse"] == root_mean_squared_error(truth, guess)
    assert got["r2"] == pytest.approx(r2_score(truth, guess), rel=1e-12)
    covariance = np.cov(truth, guess, bias=True)
    assert got["ccc"] == pytest.approx(
        2 * covariance[0, 1] / (np.trace(covariance) + (truth.mean() - guess.mean()) ** 2), rel=1e-12
    )
    invalid = compute(task, [*truth, 1.0], [*guess, None])  # left out of all of them
    assert {key: invalid[key] for key in task.metrics} == {key: got[key] for key in task.metrics}
    assert all(compute(task, [1.0, 2.0], [None, None])[key] is None for key in task.metrics)


# ---- the metric that a run selects by


def tasks(*names: str) -> dict[str, Task]:
    return {name: BUILT_IN[name] for name in names}


def test_one_name_is_for_every_task_and_a_mapping_for_those_it_names() -> None:
    both = tasks("meld", "cherma")
    assert {n: t.select for n, t in select_by(both, "ua").items()} == {"meld": "uar", "cherma": "uar"}
    assert {n: t.select for n, t in select_by(both, {"cherma": "acc"}).items()} == {"meld": "wf1", "cherma": "acc"}
    assert select_by(both, {}) == both == select_by(both, "")
    assert not select_by(tasks("mosei"), "mae")["mosei"].greater_is_better
    assert BUILT_IN["meld"].select == "wf1"


def test_all_wrong_names_come_at_once_with_the_nearest_right_ones() -> None:
    with pytest.raises(TaskError) as error:
        select_by(tasks("meld", "mosei"), {"mled": "uar", "meld": "uaar", "mosei": "ccc"})
    text = str(error.value)
    assert "eval.select.mled: the run has no such task (did you mean meld?)" in text
    assert "eval.select of meld: select='uaar'" in text
    assert "did you mean uar?" in text
    assert "eval.select of mosei: select='ccc'" in text
    own = {"own": define_task(regression(-1, 1))}
    with pytest.raises(TaskError, match=r"eval\.select of own: acc5 is undefined on the numbers of own"):
        select_by(own, "acc5")
    with pytest.raises(TaskError, match=r"(?s)unknown task 'mled'.*unknown task 'x'"):
        get_tasks(["mled", "meld", "x"], "wf1")


def test_every_alias_stands_for_a_key() -> None:
    for family in FAMILIES.values():
        assert set(family.names.values()) == {metric.key for metric in family.metrics}
