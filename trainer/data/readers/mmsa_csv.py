"""MMSA's annotations, `label.csv`: video and clip, text, labels and split of CH-SIMS, CMU-MOSI and CMU-MOSEI; no features.

A row's id is ``video$_$clip`` as in the feature pickles of the same corpora, both as they are written: a clip ``0001`` keeps
its zeros. The label is the column `label` (a number) or `annotation` (a word), unless the task names another, such as
`label_T`. Source: thuiar/MMSA, the data folders of its README.
"""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path

from trainer.data.readers.raw import SPLIT_NAMES, RawSample, Table
from trainer.data.readers.registry import ReadContext, Reader, answer_columns, decoded, has_columns, lacking_columns
from trainer.tasks import Task

COLUMNS = ("video_id", "clip_id", "text")
SPLIT = "mode"


class MmsaCsvReader(Reader):
    """MMSA's annotations, all splits in one file."""

    name = "MMSA CSV"
    title = "annotations"
    suffixes = (".csv",)
    content = "annotations"
    one_file_per_split = True
    several_questions = True

    def recognise(self, path: Path) -> bool:
        """Whether the header has MMSA's columns."""
        return has_columns(path, COLUMNS)

    def read(self, path: Path, context: ReadContext) -> list[Table]:
        known, text = len(context.faults), decoded(path, path.read_bytes(), context)
        if text is None:
            return []
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="", restval=None)
        label = context.task.label_column or _own(context.task)
        try:
            header = list(reader.fieldnames or [])
            answers = answer_columns(context, header, lambda task: [_own(task)]) if context.questions else None
            of_labels = [label] if answers is None else []
            needed = [*COLUMNS, *([*of_labels, SPLIT] if context.labelled else [])]
            missing = [name for name in needed if name not in header]
            missing += lacking_columns(context, answers or {}) if context.labelled else []
            if missing:
                context.faults.append(f"{path}: has no column {', '.join(missing)}; it has {', '.join(header)}")
                return []
            rows: dict[str, list[tuple[int, dict[str, str]]]] = {}
            for row in reader:
                if None in row.values() or "" in row:
                    context.faults.append(
                        f"{path} line {reader.line_num}: has another number of fields than the header ({len(header)})"
                    )
                    continue
                split = SPLIT_NAMES.get(row.get(SPLIT, "").strip().lower(), "")
                if not split and context.labelled:
                    context.faults.append(
                        f"{path} line {reader.line_num}: {SPLIT} {row[SPLIT]!r} is none of train, valid, test"
                    )
                rows.setdefault(split, []).append((reader.line_num, row))
        except csv.Error as error:
            context.faults.append(f"{path} line {reader.line_num}: is not valid CSV: {error}")
        if len(context.faults) > known:
            return []
        return [
            Table(path, split, len(of_split), partial(_sample, path.name, split, label, answers, of_split))
            for split, of_split in rows.items()
        ]


def _own(task: Task) -> str:
    """The format's own column of a task's labels."""
    return "label" if task.kind == "regression" else "annotation"


def _sample(
    name: str, split: str, label: str, answers: dict[str, str] | None, rows: list[tuple[int, dict[str, str]]], i: int
) -> RawSample:
    line, row = rows[i]
    found = row.get(label) if answers is None else None
    return RawSample(
        id=f"{row['video_id'].strip()}$_${row['clip_id'].strip()}",
        split=split,
        text=row["text"],
        label=None if found is None else found.strip(),
        dialogue=row["video_id"].strip() or None,
        turn=int(row["clip_id"]) if row["clip_id"].strip().isdecimal() else None,
        where=f"{name} line {line}",
        answers=None if answers is None else {question: row[column].strip() for question, column in answers.items()},
    )
