"""MELD's annotations, `train_sent_emo.csv` and its like: text, speaker, emotion, dialogue and utterance; no features.

Columns are found by name, so other corpora of that layout (CPED's CSV) are read too. A row's id is
`train_dia0_utt3`, after the names of MELD's clips. Text is kept as published, in any encoding that `trainer/encodings.py` can tell.
"""

from __future__ import annotations

import csv
import io
import re
from functools import partial
from pathlib import Path

from trainer.data.readers.raw import ALL, CLIPS, SPLIT_NAMES, RawSample, Table
from trainer.data.readers.registry import (
    ReadContext,
    Reader,
    answer_columns,
    decoded,
    has_columns,
    lacking_columns,
    prefer,
)
from trainer.tasks import Task

COLUMNS = ("Utterance", "Speaker", "Dialogue_ID", "Utterance_ID")
LABEL = "Emotion"  # unless the task names another column; samples to be predicted may lack it


class MeldCsvReader(Reader):
    """MELD's annotations: speaker, dialogue and turn, without features."""

    name = "MELD CSV"
    title = "annotations"
    suffixes = (".csv",)
    content = "annotations"
    one_file_per_split = True
    several_questions = True

    def recognise(self, path: Path) -> bool:
        """Whether the header has MELD's columns."""
        return has_columns(path, COLUMNS)

    def choose(self, task: Task, files: list[Path]) -> list[Path]:
        """Those with MELD's own names, else all."""
        return prefer(files, lambda p: re.fullmatch(rf"({'|'.join(SPLIT_NAMES)})_sent_emo", p.stem) is not None)

    def read(self, path: Path, context: ReadContext) -> list[Table]:
        split, faults = ALL if context.fold_column else context.split_of(path), context.faults
        known = len(faults)
        text = decoded(path, path.read_bytes(), context)
        if text is None:
            return []
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            label = context.task.label_column or LABEL
            answers = answer_columns(context, header, lambda task: [LABEL])
            needed = [*COLUMNS, *([label] if context.labelled and not context.questions else [])]
            needed += [context.fold_column] if context.fold_column else []
            if not set(needed) <= set(header):
                faults.append(
                    f"{path}: is not an annotation file like MELD's: its header needs {', '.join(needed)}; it has {', '.join(header)}. "
                    "Write a table of another layout as JSON lines (docs/data.md)"
                    + (f"; {CLIPS}" if "clip" in header else "")
                )
                return []
            if split is None:
                faults.append(
                    f"{path}: its name does not say which split it holds: name it train_sent_emo.csv or so; for cross-validation "
                    "name the column of the folds with --fold-column"
                )
                return []
            if context.labelled and (lacking := lacking_columns(context, answers)):
                faults.append(f"{path}: has no column {', '.join(lacking)}; it has {', '.join(header)}")
                return []
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            faults.append(f"{path} line {reader.line_num}: is not valid CSV: {error}")
            return []
        at = {name: header.index(name) for name in COLUMNS}
        if label in header and not context.questions:
            at["label"] = header.index(label)
        turns = [_turn(path, line, row, header, at, faults) for line, row in rows]
        if len(faults) > known:
            return []
        fold = header.index(context.fold_column) if context.fold_column else None
        answers_at = {name: header.index(column) for name, column in answers.items()} if context.questions else None
        return [Table(path, split, len(rows), partial(_sample, path, split, at, rows, turns, fold, answers_at))]


def _turn(path: Path, line: int, row: list[str], header: list[str], at: dict[str, int], faults: list[str]) -> int:
    """The number at the end of a row's Utterance_ID; 0 and a fault where the row cannot be used."""
    if len(row) != len(header):
        faults.append(f"{path} line {line}: has {len(row)} fields, the header {len(header)}")
        return 0
    dialogue, utterance = row[at["Dialogue_ID"]], row[at["Utterance_ID"]]
    turn = re.search(r"\d{1,18}$", utterance.strip())
    if turn is None or not dialogue.strip():
        faults.append(
            f"{path} line {line}: Dialogue_ID {dialogue!r}, Utterance_ID {utterance!r} do not name a place in a dialogue"
        )
        return 0
    return int(turn[0])


def _sample(
    path: Path,
    split: str,
    at: dict[str, int],
    rows: list[tuple[int, list[str]]],
    turns: list[int],
    fold: int | None,
    answers_at: dict[str, int] | None,
    i: int,
) -> RawSample:
    line, row = rows[i]
    dialogue, utterance = row[at["Dialogue_ID"]].strip(), row[at["Utterance_ID"]].strip()
    return RawSample(
        id=f"{path.stem if split in ('', ALL) else split}_dia{dialogue}_utt{utterance}",
        split=split,
        text=row[at["Utterance"]],
        label=row[at["label"]].strip() if "label" in at else None,
        speaker=row[at["Speaker"]].strip() or None,
        dialogue=dialogue,
        turn=turns[i],
        fold=None if fold is None else row[fold].strip() or None,
        where=f"{path.name} line {line}",
        answers=None if answers_at is None else {name: row[k].strip() for name, k in answers_at.items()},
    )
