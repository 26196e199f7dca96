"""The tasks: label space or number grid, prompts in English and Chinese, metrics and the one that selects a checkpoint.

Sources: MELD (Poria et al. 2019), CHERMA (Sun et al. 2023), CMU-MOSEI (Zadeh et al. 2018), CMU-MOSI (Zadeh et al. 2016),
CH-SIMS v2 (Liu et al. 2022). Label order is fixed: it breaks ties.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.metric_table import FAMILIES, Metric

Language = Literal["en", "zh"]
Kind = Literal["classification", "regression"]
AnswerStyle = Literal["words", "indices"]  # of labels: as themselves, or by their number


class TaskError(ValueError):
    """A task that is not known, or whose definition cannot be used."""


class Grid(BaseModel):
    """The numbers a regression task can answer: low, low + step, ..., high; one decimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: float
    high: float
    step: float = 0.1

    @model_validator(mode="after")
    def _steps(self) -> Grid:
        if self.step <= 0 or self.high <= self.low:
            raise ValueError(f"a grid needs low < high and step > 0, not {self.low}..{self.high} by {self.step}")
        for name in ("low", "high", "step"):
            scaled = getattr(self, name) * 10
            if abs(scaled - round(scaled)) > 1e-9:
                raise ValueError(f"grid {name}={getattr(self, name)} needs one decimal at most")
        if round((self.high - self.low) * 10) % round(self.step * 10):
            raise ValueError(f"grid {self.low}..{self.high} is not a whole number of steps of {self.step}")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        low, high, step = round(self.low * 10), round(self.high * 10), round(self.step * 10)
        return tuple(tenth / 10 for tenth in range(low, high + 1, step))

    def index(self, value: float) -> int:
        """The index of the number nearest to `value`, ties away from 0.

        The tie is judged on the shortest decimal that reads back to the same float32 or float64, so 0.25 is a tie and
        the 0.25000001 of an upcast label is the tie it was meant to be.
        """
        tenths = (Decimal(repr(round(float(value), 6))) / Decimal(repr(self.step))).quantize(Decimal(1), ROUND_HALF_UP)
        offset = (Decimal(repr(self.low)) / Decimal(repr(self.step))).quantize(Decimal(1), ROUND_HALF_UP)
        return min(max(int(tenths - offset), 0), len(self.values) - 1)


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


class Task(BaseModel):
    """One benchmark's question."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    kind: Kind
    language: Language = "en"
    labels: tuple[str, ...] = ()
    grid: Grid | None = None
    family: str = "emotion"  # of metrics, a key of trainer.metric_table.FAMILIES
    select: str  # the metric that chooses the checkpoint
    prompts: dict[Language, Prompt]

    @model_validator(mode="after")
    def _whole(self) -> Task:
        fitting = _families(self.kind)
        families = "metrics family " + " or ".join(map(repr, fitting))
        if self.kind == "classification":
            if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or not all(map(str.strip, self.labels)):
                raise ValueError(f"classification needs at least two different labels, not {list(self.labels)}")
            if self.grid is not None or self.family not in fitting:
                raise ValueError(f"classification has labels and the {families}, and no grid")
        elif self.grid is None or self.labels or self.family not in fitting:
            raise ValueError(f"regression needs a grid and a {families}, and no labels")
        if self.select not in self.metrics:
            raise ValueError(f"select={self.select!r} is none of the task's metrics: {', '.join(self.metrics)}")
        if self.language not in self.prompts:
            raise ValueError(f"no prompt in the task's language {self.language!r}")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The keys of the task's metrics."""
        return tuple(metric.key for metric in FAMILIES[self.family].metrics)

    def metric(self, key: str) -> Metric:
        """One of :attr:`metrics`; KeyError where there is none."""
        return FAMILIES[self.family].metric(key)

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the selecting metric is better."""
        return self.metric(self.select).greater_is_better

    @cached_property
    def answers_words(self) -> tuple[str, ...]:
        if self.grid is None:
            return self.labels
        return tuple(format_number(v) for v in self.grid.values)

    def answers(self, style: AnswerStyle = "words") -> tuple[str, ...]:
        """Every answer the model may give, in label or number order; numbers are always words."""
        if style == "indices" and self.kind == "classification":
            return tuple(str(i) for i in range(len(self.labels)))
        return self.answers_words

    def answer_texts(self, style: AnswerStyle = "words", language: Language | None = None) -> tuple[str, ...]:
        """:meth:`answers` as they follow the cue: behind a space where the prompt's language writes one.

        The one place that says so, for training targets and scoring alike: answers are tokenised apart from the cue.
        """
        space = " " if (language or self.language) == "en" else ""
        return tuple(space + answer for answer in self.answers(style))

    def answer_index(self, target: float) -> int:
        """The index in :meth:`answers` of a target: the label's own index, or the nearest number of the grid."""
        return int(target) if self.grid is None else self.grid.index(target)

    def instruction(self, style: AnswerStyle = "words", language: Language | None = None) -> str:
        language = language or self.language
        if language not in self.prompts:
            raise TaskError(f"task {self.name} has no prompt in {language!r}; it has {', '.join(self.prompts)}")
        if self.grid is not None:
            answers = f"{format_number(self.grid.low)} … {format_number(self.grid.high)}"
        elif style == "indices":
            answers = ", ".join(f"{i} {label}" for i, label in enumerate(self.labels))
        else:
            answers = ("、" if language == "zh" else ", ").join(self.labels)
        return self.prompts[language].instruction.replace("{answers}", answers)

    def cue(self, language: Language | None = None) -> str:
        return self.prompts[language or self.language].cue

    def close(self, language: Language | None = None) -> str:
        return self.prompts[language or self.language].close


def format_number(value: float) -> str:
    """One decimal, a sign only for negatives, no ``-0.0``."""
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text


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
            name="diagnostic-regression",
            kind="regression",
            grid=Grid(low=-1.0, high=1.0),
            family="sims",
            select="mae",
            prompts=_SHORT_PROMPTS,
        ),
    )
}


def get_task(name: str) -> Task:
    """A built-in task by name, or the task that a YAML file defines.

    Raises:
        TaskError: unknown name (with the nearest one), or a definition with faults (all of them).
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise TaskError(f"no task file {name}")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TaskError(f"{name} is not readable YAML: {error}") from error
        return define_task(raw, where=name)
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    near = f"; did you mean {close[0]}?" if close else "."
    raise TaskError(
        f"unknown task {name!r}{near} Known: {', '.join(BUILT_IN)}; or the path of a YAML file that defines one"
    )


def check_tasks(names: Sequence[str]) -> None:
    """Refuse unknown tasks.

    Raises:
        TaskError: all that :func:`get_task` says of any of them.
    """
    faults = []
    for name in names:
        try:
            get_task(name)
        except TaskError as error:
            faults.append(str(error))
    if faults:
        raise TaskError("\n".join(faults))


def define_task(raw: Any, where: str = "task") -> Task:
    """A task from a plain mapping, such as a YAML file's or a dataset record's.

    `family` defaults to the kind's first, `select` to the family's usual metric, `prompts` to the general ones.
    """
    if not isinstance(raw, dict):
        raise TaskError(f"{where} must hold a mapping with name, kind, and labels or grid")
    raw = dict(raw)
    regression = raw.get("kind") == "regression"
    raw.setdefault("family", _families("regression" if regression else "classification")[0])
    family = FAMILIES.get(str(raw["family"]))
    raw.setdefault("select", "" if family is None else family.select)
    raw.setdefault("prompts", _sentiment_prompts() if regression else _emotion_prompts("utterance", "这句话"))
    try:
        return Task.model_validate(raw)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(map(str, e['loc'])) or 'task'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise TaskError("\n".join([f"{where}: {len(faults)} fault(s) in the task's definition", *faults])) from error
