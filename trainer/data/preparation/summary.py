"""What a prepared dataset holds, as numbers and as tables.

For regression `labels` counts the signs of the published numbers (negative, zero, positive), which is what the binary
metrics of these benchmarks cut by; `target` beside it has mean, standard deviation and range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trainer.data.preparation.columns import STREAMS
from trainer.data.preparation.faults import describe
from trainer.data.preparation.feature_summary import StandardisationSummary, standardisation_json, standardisation_lines
from trainer.data.preparation.record import DatasetRecord, LengthStatistics, QuestionStatistics, SplitStatistics
from trainer.data.preparation.rows import Seen
from trainer.data.readers.raw import ALL
from trainer.features.recipe_record import kinds_of, name_of, shipped_name
from trainer.label_sets import decode_sets
from trainer.questions import Definition, Questions
from trainer.tasks import Task

SIGNS = ("negative", "zero", "positive")


def statistics(definition: Definition, rows: Sequence[Seen], dropped: int = 0) -> SplitStatistics:
    """The record's entry of one split; of several questions the answers to each under `questions`, to the first at its top too."""
    out: SplitStatistics = {"n": len(rows), "labels": {}}
    if isinstance(definition, Questions):
        questions = {task.name: _question(task, rows) for task in definition.questions}
        first = next(iter(questions.values()))
        out["labels"] = first["labels"]
        if "target" in first:
            out["target"] = first["target"]
        out["questions"] = questions
    else:
        targets = np.array([row.target for row in rows], dtype=np.float64)
        out |= cast(SplitStatistics, _answers(definition, targets, sum(row.shared for row in rows)))
    out["text_characters"] = _lengths([row.characters for row in rows])
    out["audio_frames"], out["video_frames"] = (
        _lengths([row.frames[i] for row in rows if row.frames[i]]) for i in range(len(STREAMS))
    )
    out["missing"] = {name: sum(not row.frames[i] for row in rows) for i, name in enumerate(STREAMS)}
    if silent := sum(not row.characters for row in rows):
        out["missing"]["text"] = silent
    out["masked_frames"] = {name: sum(row.masked[i] for row in rows) for i, name in enumerate(STREAMS)}
    padding = {name: sum(row.padding[i] for row in rows) for i, name in enumerate(STREAMS)}
    if any(padding.values()):
        out["padding"] = padding
    out["dropped"] = dropped
    return out


def _answers(task: Task, targets: np.ndarray, shared: int) -> QuestionStatistics:
    """What a split's entry says of the answers to one question."""
    if task.grid is None:
        if task.kind == "multilabel":
            counts = decode_sets(targets, len(task.labels)).sum(0)
        else:
            counts = [(targets == i).sum() for i in range(len(task.labels))]
        labels = {label: int(count) for label, count in zip(task.labels, counts, strict=True)}
    else:
        labels = {name: int((np.sign(targets) == sign).sum()) for name, sign in zip(SIGNS, (-1, 0, 1), strict=True)}
    out: QuestionStatistics = {"labels": labels}
    if task.grid is not None:
        out["target"] = {
            "mean": _float(targets.mean()) if len(targets) else None,
            "std": _float(targets.std()) if len(targets) else None,
            "min": _float(targets.min()) if len(targets) else None,
            "max": _float(targets.max()) if len(targets) else None,
        }
    if task.kind == "multilabel":
        out["without_label"] = int((targets == 0).sum())
    if shared:
        out["shared"] = shared
    return out


def _question(task: Task, rows: Sequence[Seen]) -> QuestionStatistics:
    """The answers to one of several questions."""
    found = [row.answers[task.name] for row in rows if row.answers and task.name in row.answers]
    targets = np.array([target for target, _ in found], dtype=np.float64)
    out: QuestionStatistics = {"n": len(found), "unanswered": len(rows) - len(found)}
    return out | _answers(task, targets, sum(shared for _, shared in found))


def _float(value: Any) -> float:
    return round(float(value), 6)


def _lengths(values: Sequence[int]) -> LengthStatistics:
    if not values:
        return {"mean": None, "p50": None, "p95": None, "max": None}
    p50, p95 = np.percentile(values, [50, 95], method="inverted_cdf")
    return {"mean": round(float(np.mean(values)), 2), "p50": int(p50), "p95": int(p95), "max": int(max(values))}


class SplitSummary(SplitStatistics, total=False):
    """What `egmf data show` says of a split."""

    standardisation: StandardisationSummary
    recipe: dict[
        str, Any
    ]  # by which all features were extracted: its name (null: no shipped one), its hash, and modality -> kind


def summary_json(record: DatasetRecord) -> dict[str, SplitSummary]:
    """``{split: {"n", "labels": {label: count}, lengths, "missing", "masked_frames", "dropped"}}``.

    With several questions "questions" has the answers to each (:class:`trainer.data.preparation.record.QuestionStatistics`), and "labels" are those
    of the first. A dataset with folds has the one split "all", with ``"folds": {fold: count}`` besides. The split whose frames were
    measured, train (or all), has under "standardisation" the features (:class:`trainer.data.preparation.feature_summary.StandardisationSummary`).
    """
    out = {split: cast(SplitSummary, dict(entry)) for split, entry in record["splits"].items()}
    if "folds" in record:
        out[ALL]["folds"] = record["folds"]
    out["train" if "train" in out else ALL]["standardisation"] = standardisation_json(record)
    if "recipe" in record:
        out["train" if "train" in out else ALL]["recipe"] = {
            "name": shipped_name(record["recipe"]),
            "hash": record["recipe"]["hash"],
            "kinds": kinds_of(record["recipe"]),
        }
    return out


def summary_table(record: DatasetRecord) -> Group:
    """One table with a column per split, then one line for each kind of fault; nothing in it is cut off."""
    splits = record["splits"]
    table = Table(title=f"{record['task']['name']}  {record['fingerprint'][:12]}", title_justify="left")
    table.add_column("", no_wrap=True)
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)

    def add(name: str, *path: str, section: bool = False) -> None:
        table.add_row(name, *(_cell(entry, path) for entry in splits.values()), end_section=section)

    add("samples", "n", section=True)
    first = next(iter(splits.values()))
    if "questions" in first:
        for name in first["questions"]:
            _add_answers(table, {split: entry["questions"][name] for split, entry in splits.items()}, f"{name}: ")
    else:
        _add_answers(table, splits)
    for key in ("mean", "p50", "p95", "max"):
        add(f"characters {key}", "text_characters", key, section=key == "max")
    if any("text" in entry["missing"] for entry in splits.values()):
        counts = [str(entry["missing"].get("text", 0)) for entry in splits.values()]
        table.add_row("text missing", *counts, end_section=True)
    for name in STREAMS:
        if record["widths"][name]:
            for key in ("mean", "p50", "p95", "max"):
                add(f"{name} frames {key}", f"{name}_frames", key)
            add(f"{name} frames masked", "masked_frames", name)
            if any("padding" in entry for entry in splits.values()):
                cut = [str(entry.get("padding", {}).get(name, 0)) for entry in splits.values()]
                table.add_row(f"{name} padding cut", *cut)
            add(f"{name} missing", "missing", name, section=True)
    if any(entry["dropped"] for entry in splits.values()):
        add("left out", "dropped", section=True)
    folds = (
        [f"{len(record['folds'])} folds: " + ", ".join(f"{k} {n}" for k, n in record["folds"].items())]
        if "folds" in record
        else []
    )
    recipe = [f"extracted by {name_of(record['recipe'])}"] if "recipe" in record else []
    lines = [_features(record), *recipe, *standardisation_lines(record), *folds]
    lines += [*(f"fault: {line}" for line in describe(record["faults"]))]
    lines += [f"note: {note}" for note in record["source"].get("notes", [])]
    return Group(table, *(Text(line) for line in lines))


def _add_answers(table: Table, splits: Mapping[str, SplitStatistics | QuestionStatistics], head: str = "") -> None:
    """The rows of one question; `head` stands before each where there are several."""
    entries = list(splits.values())
    first = entries[0]
    if head:
        for name, key in (("answered", "n"), ("not answered", "unanswered")):
            table.add_row(f"{head}{name}", *(_cell(entry, (key,)) for entry in entries))
    for label in first["labels"]:
        last = label == list(first["labels"])[-1] and "target" not in first
        table.add_row(f"{head}{label}", *(_cell(entry, ("labels", label)) for entry in entries), end_section=last)
    for name, key in (("none of them", "without_label"), ("annotators disagree", "shared")):
        if any(key in entry for entry in entries):
            counts = [str(cast(dict[str, int], entry).get(key, 0)) for entry in entries]
            table.add_row(f"{head}{name}", *counts, end_section=True)
    for key in first.get("target", {}):
        cells = [_cell(entry, ("target", key)) for entry in entries]
        table.add_row(f"{head}target {key}", *cells, end_section=key == "max")


def _cell(entry: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = entry
    for key in path:
        value = value[key]
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}" if isinstance(value, float) else str(value)


def _features(record: DatasetRecord) -> str:
    def one(name: str) -> str:
        width, rate = record["widths"][name], record["rates"][name]
        if not width:
            return f"{name}: none"
        return f"{name}: {width} features per frame, " + (f"{rate:g} frames/s" if rate else "rate unknown")

    return "; ".join(one(name) for name in STREAMS)
