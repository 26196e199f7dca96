"""The tasks: label space or number grid, prompts in English and Chinese, metrics and the one that selects a checkpoint.

Sources: MELD (Poria et al. 2019), CHERMA (Sun et al. 2023), CMU-MOSEI (Zadeh et al. 2018), CMU-MOSI (Zadeh et al. 2016),
CH-SIMS v2 (Liu et al. 2022). Label order is fixed: it breaks ties.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from trainer.files import load_yaml
from trainer.grid import Grid
from trainer.label_sets import MOST_LABELS, NONE, SEPARATORS, parse_set, set_text
from trainer.metric_table import FAMILIES, Metric

Language = str  # a language tag, such as "en", "zh" or "de"; a task has a prompt in each of its own
Kind = Literal["classification", "regression", "multilabel"]
UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "yue", "wuu")  # languages that write no space between words
AnswerStyle = Literal["words", "indices"]  # of labels: as themselves, or by their number
APPLIES = {"zh": ("是", "否")}  # how a multi-label task says that a label applies and that it does not
APPLIES_ELSE = ("yes", "no")
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"  # of a task
MOST_NUMBERS = 2001  # of a grid: each is scored for every sample, and a tree of so many has 3000 to 5000 tokens


class TaskError(ValueError):
    """A task that is not known, or whose definition cannot be used; `faults` are its faults without place and number."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = list(faults) or [message]


class Prompt(BaseModel):
    """The text around a sample: `instruction` (with ``{answers}`` for the possible answers) before it, `cue` after it.

    `close` ends the sample, before the cue. It is short since every sample pays for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    instruction: str
    cue: str
    close: str = "</>"


def _families(kind: Kind) -> list[str]:
    """The families of metrics that a task of `kind` can have."""
    return [name for name, family in FAMILIES.items() if family.kind == kind]


def _no_metric(name: str, family: str, kind: Kind, grid: Grid | None) -> str:
    """That a family has no such metric; the nearest one, and the families that have it."""
    names = FAMILIES[family].names
    text = f"select={name!r} is none of the metrics of family {family!r}{_near(name, names)}"
    hints = []
    for other in _families(kind):
        if name in FAMILIES[other].names:
            misfit = None if grid is None else FAMILIES[other].misfit(grid.low, grid.high)
            hints.append(f"; family {other!r} has it" + (f", which is not for this grid: {misfit}" if misfit else ""))
    return f"{text}: {', '.join(names)}{''.join(hints)}"


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


class Task(BaseModel):
    """One benchmark's question."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=NAME)
    kind: Kind
    language: Language = Field(default="en", pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$")
    labels: tuple[str, ...] = ()
    grid: Grid | None = None
    family: str = "emotion"  # of metrics, a key of trainer.metric_table.FAMILIES
    select: str  # the metric that chooses the checkpoint
    prompts: dict[Language, Prompt]
    label_column: str | None = None  # of annotations and own samples, where it is not the format's own

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without a `label_column` that is not set: the fingerprints of datasets from before there was one stay."""
        out: dict[str, object] = serialize(self)
        if self.label_column is None:
            del out["label_column"]
        return out

    @model_validator(mode="after")
    def _whole(self) -> Task:
        fitting = _families(self.kind)
        families = "metrics family " + " or ".join(map(repr, fitting))
        faults = []
        if self.kind != "regression":
            if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or not all(map(str.strip, self.labels)):
                faults.append(f"{self.kind} needs at least two different labels, not {list(self.labels)}")
            if self.grid is not None or self.family not in fitting:
                faults.append(f"{self.kind} has labels and the {families}, and no grid")
            if self.kind == "multilabel":
                faults += self._unfit_for_sets()
        elif self.grid is None or self.labels or self.family not in fitting:
            faults.append(f"regression needs a grid and a {families}, and no labels")
        if self.family in FAMILIES and self.select not in self.metrics:
            faults.append(_no_metric(self.select, self.family, self.kind, self.grid))
        if self.language not in self.prompts:
            faults.append(
                f"no prompt in the task's language {self.language!r}: write one, prompts: {{{self.language}: {{instruction: …, cue: …}}}}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _unfit_for_sets(self) -> list[str]:
        """Why sets of these labels cannot be written or held."""
        faults = []
        if len(self.labels) > MOST_LABELS:
            faults.append(f"multilabel has at most {MOST_LABELS} labels, not {len(self.labels)}")
        if split := [label for label in self.labels if SEPARATORS.search(label)]:
            faults.append(
                f"a label of a multilabel task may not hold a comma, semicolon or bar: {', '.join(map(repr, split))}"
            )
        if NONE in self.labels:
            faults.append(f"{NONE!r} stands for samples without any label: leave it out of labels")
        return faults

    def word(self, value: float) -> str | float:
        """A target or prediction as people write it: the label's word, the labels of a set, or the number itself."""
        if self.kind == "multilabel":
            return set_text(self.labels, value)
        return self.labels[int(value)] if self.kind == "classification" else float(value)

    def parse_word(self, text: str) -> float | None:
        """The target or prediction of labels as :meth:`word` writes them; None where they are none of the task's.

        For tasks with labels; letter for letter.
        """
        if self.kind == "multilabel":
            return parse_set(self.labels, text)
        return float(self.labels.index(text)) if text in self.labels else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The keys of the task's metrics."""
        return tuple(metric.key for metric in FAMILIES[self.family].metrics)

    @property
    def metric_names(self) -> dict[str, str]:
        """Every name by which one of :attr:`metrics` can be asked for -> its key."""
        return FAMILIES[self.family].names

    def metric(self, key: str) -> Metric:
        """One of :attr:`metrics`; KeyError where there is none."""
        return FAMILIES[self.family].metric(key)

    @cached_property
    def undefined(self) -> dict[str, str]:
        """Those of :attr:`metrics` that mean nothing on the task's numbers, and why: such as signs where none is negative."""
        return {} if self.grid is None else FAMILIES[self.family].undefined(self.grid.low, self.grid.high)

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the selecting metric is better."""
        return self.metric(self.select).greater_is_better

    @cached_property
    def answers_words(self) -> tuple[str, ...]:
        if self.grid is None:
            return self.labels
        return tuple(map(self.grid.text, self.grid.values))

    def answers(self, style: AnswerStyle = "words", language: Language | None = None) -> tuple[str, ...]:
        """Every answer the model may give, in label or number order; numbers are always words.

        A multi-label task has two for each label, that it applies and that it does not: "joy: yes", "joy: no".
        """
        if style == "indices" and self.grid is None:
            words = tuple(str(i) for i in range(len(self.labels)))
        else:
            words = self.answers_words
        if self.kind != "multilabel":
            return words
        tag = (language or self.language).split("-")[0]
        return tuple(
            f"{word}{'：' if tag == 'zh' else ': '}{says}" for word in words for says in APPLIES.get(tag, APPLIES_ELSE)
        )

    @property
    def probabilities(self) -> int:
        """How many probabilities a prediction has: one for each answer, of a multi-label task one for each label."""
        return len(self.labels) if self.kind == "multilabel" else len(self.answers())

    def answer_texts(self, style: AnswerStyle = "words", language: Language | None = None) -> tuple[str, ...]:
        """:meth:`answers` as they follow the cue: behind a space where the prompt's language writes one.

        The one place that says so, for training targets and scoring alike: answers are tokenised apart from the cue.
        """
        space = "" if (language or self.language).split("-")[0] in UNSPACED else " "
        return tuple(space + answer for answer in self.answers(style, language))

    def answer_index(self, target: float) -> int:
        """The index in :meth:`answers` of a target: the label's own index, or the nearest number of the grid.

        A sample of a multi-label task has an answer for every label, and no single one.
        """
        assert self.kind != "multilabel"
        return int(target) if self.grid is None else self.grid.index(target)

    def instruction(self, style: AnswerStyle = "words", language: Language | None = None) -> str:
        language = language or self.language
        if language not in self.prompts:
            raise TaskError(f"task {self.name} has no prompt in {language!r}; it has {', '.join(self.prompts)}")
        if self.grid is not None:
            answers = f"{self.grid.text(self.grid.low)} … {self.grid.text(self.grid.high)}"
        elif style == "indices":
            answers = ", ".join(f"{i} {label}" for i, label in enumerate(self.labels))
        else:
            answers = ("、" if language == "zh" else ", ").join(self.labels)
        return self.prompts[language].instruction.replace("{answers}", answers)

    def cue(self, language: Language | None = None) -> str:
        return self.prompts[language or self.language].cue

    def close(self, language: Language | None = None) -> str:
        return self.prompts[language or self.language].close


def _emotion_prompts(unit_en: str, unit_zh: str) -> dict[Language, Prompt]:
    return {
        "en": Prompt(
            instruction=f"Recognise the emotion of the speaker in this {unit_en} from its words, voice and face. "
            "Answer with one of: {answers}.",
            cue="Emotion:",
        ),
        "zh": Prompt(
            instruction=f"根据{unit_zh}的文字、声音和表情判断说话人的情绪，从以下选项中选择一个回答：{{answers}}。",
            cue="情绪：",
        ),
    }


def _multilabel_prompts() -> dict[Language, Prompt]:
    return {
        "en": Prompt(
            instruction="Say of each emotion whether the speaker shows it in words, voice or face: {answers}.",
            cue="Emotions:",
        ),
        "zh": Prompt(instruction="根据文字、声音和表情判断说话人是否表现出以下每种情绪：{answers}。", cue="情绪："),
    }


def _sentiment_prompts() -> dict[Language, Prompt]:
    return {
        "en": Prompt(
            instruction="Rate the sentiment of the speaker in this clip from words, voice and face. "
            "Answer with a number, negative to positive: {answers}.",
            cue="Sentiment:",
        ),
        "zh": Prompt(
            instruction="根据片段的文字、声音和表情为说话人的情感打分，用从负到正的一个数字回答：{answers}。",
            cue="情感：",
        ),
    }


# the long closing tag of the generated tasks: with the short one the tiny random backbone does not learn them in 700 steps
_SHORT_PROMPTS: dict[Language, Prompt] = {
    "en": Prompt(instruction="Answer with one of: {answers}.", cue="Answer:", close="</Multimodal>"),
    "zh": Prompt(instruction="从中选择：{answers}。", cue="回答：", close="</Multimodal>"),
}

BUILT_IN: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="meld",
            kind="classification",
            labels=("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
            select="wf1",
            prompts=_emotion_prompts("utterance", "这句话"),
        ),
        Task(
            name="cherma",
            kind="classification",
            language="zh",
            labels=("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇"),
            select="wf1",
            prompts=_emotion_prompts("clip", "这个片段"),
        ),
        Task(
            name="mosei",
            kind="regression",
            grid=Grid(low=-3.0, high=3.0),
            family="mosei",
            select="non0_f1",
            prompts=_sentiment_prompts(),
        ),
        Task(
            name="mosi",
            kind="regression",
            grid=Grid(low=-3.0, high=3.0),
            family="mosei",
            select="non0_f1",
            prompts=_sentiment_prompts(),
        ),
        Task(
            name="simsv2",
            kind="regression",
            language="zh",
            grid=Grid(low=-1.0, high=1.0),
            family="sims",
            select="acc2",
            prompts=_sentiment_prompts(),
        ),
        Task(
            name="diagnostic",
            kind="classification",
            labels=("joy", "anger", "sadness", "fear"),
            select="acc",
            prompts=_SHORT_PROMPTS,
        ),
        Task(
            name="spoken",
            kind="classification",
            labels=("sure", "unsure"),
            select="acc",
            prompts=_SHORT_PROMPTS,
        ),
        Task(
            name="diagnostic-regression",
            kind="regression",
            grid=Grid(low=-1.0, high=1.0),
            family="sims",
            select="mae",
            prompts=_SHORT_PROMPTS,
        ),
    )
}


def get_task(name: str, *, saved: bool = False) -> Task:
    """A built-in task by name, or the task that a YAML file defines.

    `saved`: as :func:`define_task` takes it.

    Raises:
        TaskError: unknown name (with the nearest one), or a definition with faults (all of them).
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if is_task_file(name):
        return define_task(read_task_file(name), where=name, saved=saved)
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    near = f"; did you mean {close[0]}?" if close else "."
    raise TaskError(
        f"unknown task {name!r}{near} Known: {', '.join(BUILT_IN)}; or the path of a YAML file that defines one"
    )


def is_task_file(name: str) -> bool:
    """Whether `name` is the path of a YAML file, and no built-in task's name."""
    return name.endswith((".yaml", ".yml"))


def read_task_file(name: str) -> Any:
    """What a task's YAML file holds.

    Raises:
        TaskError: there is none, or it cannot be read.
    """
    path = Path(name)
    if not path.is_file():
        raise TaskError(f"no task file {name}")
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{name} is not readable YAML: {error}") from error


def select_by(tasks: Mapping[str, Task], select: str | Mapping[str, str]) -> dict[str, Task]:
    """The tasks with other metrics that choose the checkpoint.

    Args:
        select: a metric of every task, or task -> metric; tasks that it does not name keep theirs, and so do all where it
            is empty.

    Raises:
        TaskError: every name that is no task or no metric of its task, and every metric that is undefined on a task's numbers.
    """
    if isinstance(select, str):
        select = dict.fromkeys(tasks, select) if select else {}
    faults = [
        f"eval.select.{name}: the run has no such task{_near(name, tasks)}; it has {', '.join(tasks)}"
        for name in select
        if name not in tasks
    ]
    out = dict(tasks)
    for name, task in tasks.items():
        if name not in select:
            continue
        key = task.metric_names.get(select[name])
        if key is None:
            faults.append(f"eval.select of {name}: {_no_metric(select[name], task.family, task.kind, task.grid)}")
        elif key in task.undefined:
            faults.append(f"eval.select of {name}: {_undefined(task, key)}")
        else:
            out[name] = task.model_copy(update={"select": key})
    if faults:
        raise TaskError("\n".join(faults))
    return out


def define_task(raw: Any, where: str = "task", *, saved: bool = False) -> Task:
    """A task from a plain mapping, such as a YAML file's or a dataset record's.

    `family` of metrics defaults to `emotion` for classification, to `multilabel` for several labels a sample; for regression to `mosei` where the grid has numbers on both
    sides of 0, and to `regression` elsewhere. `select` defaults to the family's usual metric, `prompts` to the general ones.

    Args:
        saved: a dataset or run was already made with it, perhaps by an older version. Then a family that does not fit the
            grid is not refused (its meaningless metrics are undefined, see :attr:`Task.undefined`), nor is a large grid.

    Raises:
        TaskError: all faults of the definition.
    """
    if not isinstance(raw, dict):
        raise TaskError(f"{where} must hold a mapping with name, kind, and labels or grid")
    if "questions" in raw:
        raise TaskError(
            f"{where} asks several questions, and one task is needed here: name the YAML file of one of them"
        )
    raw = dict(raw)
    raw.setdefault("family", _default_family(raw, saved=saved))
    if (family := FAMILIES.get(str(raw["family"]))) is not None:
        raw.setdefault("select", family.select)
        raw["select"] = family.names.get(str(raw["select"]), raw["select"])
    raw.setdefault("select", "")
    if raw.get("kind") == "multilabel":
        prompts = _multilabel_prompts()
    else:
        prompts = _sentiment_prompts() if raw.get("kind") == "regression" else _emotion_prompts("utterance", "这句话")
    raw.setdefault("prompts", prompts)
    try:
        task = Task.model_validate(raw)
        faults = [] if saved else _unfit(task)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, e['loc'])) or 'task'}: {e['msg'].removeprefix('Value error, ')}{_quoted(e['loc'], e['input'])}"
            for e in error.errors()
        ]
    if faults:
        lines = [f"{where}: {len(faults)} fault(s) in the task's definition", *(f"  {fault}" for fault in faults)]
        raise TaskError("\n".join(lines), faults)
    return task


def _default_family(raw: Mapping[str, Any], *, saved: bool) -> str:
    if raw.get("kind") != "regression":
        return "multilabel" if raw.get("kind") == "multilabel" else "emotion"
    try:
        grid = Grid.model_validate(raw.get("grid"))
    except ValidationError:  # is reported with the other faults
        return "mosei"
    of_older_version = saved and raw.get("select", "ccc") not in FAMILIES["regression"].names
    return "mosei" if grid.low < 0 < grid.high or of_older_version else "regression"


def _unfit(task: Task) -> list[str]:
    """What a task's own faults would not show: metrics that mean nothing on its numbers, and more numbers than can be scored."""
    if task.grid is None:
        return []
    faults = []
    if misfit := FAMILIES[task.family].misfit(task.grid.low, task.grid.high):
        numbers = f"{task.grid.text(task.grid.low)} … {task.grid.text(task.grid.high)}"
        faults.append(
            f"family: {task.family!r} is not for the grid {numbers}: {misfit}. Write family: regression "
            f"({', '.join(FAMILIES['regression'].names)}), which fits every grid"
        )
    elif task.select in task.undefined:
        faults.append(f"select: {_undefined(task, task.select)}")
    if task.grid.size > MOST_NUMBERS:
        faults.append(
            f"grid: {task.grid.size} numbers, of which each is scored for every sample; at most {MOST_NUMBERS}: take a greater "
            "step (predictions are expectations, which lie between the numbers of the grid too)"
        )
    return faults


def _undefined(task: Task, key: str) -> str:
    left = [name for name in task.metrics if name not in task.undefined]
    return f"{key} is undefined on the numbers of {task.name}: {task.undefined[key]}. Defined are {', '.join(left)}"


def _quoted(place: tuple[int | str, ...], value: Any) -> str:
    """What to do about a label that YAML reads as a number, a date or a truth value."""
    if place[:1] != ("labels",) or isinstance(value, (str, list, dict)):
        return ""
    return f", and is read as {type(value).__name__} {value!r}: put the label in quotes"
