"""MELD's annotations, `train_sent_emo.csv` and its like: text, speaker, emotion, dialogue and utterance; no features.

Columns are found by name, so other corpora of that layout (CPED's CSV) are read too. A row's id is
`train_dia0_utt3`, after the names of MELD's clips. Text is kept as published; bytes that are no UTF-8 are Windows-1252.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from trainer.data.pickles.pickle_vm import decode_legacy_text
from trainer.data.readers.raw import RawSample, Table, split_of
from trainer.tasks import Task

COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")


def is_annotation(path: Path) -> bool:
    """Whether the file's header has MELD's columns."""
    with path.open("rb") as file:
        head = file.readline(1 << 16).decode("utf-8-sig", "replace")
    return set(COLUMNS) <= {name.strip().strip('"') for name in head.split(",")}


def read_meld_csv(task: Task, path: Path, faults: list[str], notes: list[str]) -> list[Table]:
    """The one table in an annotation file; what is wrong with it goes to `faults`."""
    split = split_of(path.stem)
    if split is None:
        faults.append(f"{path}: its name does not say which split it holds: name it train_sent_emo.csv or so")
        return []
    if not is_annotation(path):
        faults.append(f"{path}: is no annotation file like MELD's: its header needs {', '.join(COLUMNS)}")
        return []
    known = len(faults)
    reader = csv.reader(io.StringIO(_decode(path, notes), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        header = [name.strip() for name in next(reader)]
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        faults.append(f"{path} line {reader.line_num}: is no CSV: {error}")
        return []
    text, speaker, label, dialogue, utterance = (header.index(name) for name in COLUMNS)
    turns = []
    for line, row in rows:
        if len(row) != len(header):
            faults.append(f"{path} line {line}: has {len(row)} fields, the header {len(header)}")
            continue
        turn = re.search(r"\d{1,18}$", row[utterance].strip())
        if turn is None or not row[dialogue].strip():
            faults.append(
                f"{path} line {line}: Dialogue_ID {row[dialogue]!r}, Utterance_ID {row[utterance]!r} is no place"
            )
            continue
        turns.append(int(turn[0]))
    if len(faults) > known:
        return []

    def sample(i: int) -> RawSample:
        line, row = rows[i]
        return RawSample(
            id=f"{split}_dia{row[dialogue].strip()}_utt{row[utterance].strip()}",
            split=split,
            text=row[text],
            label=row[label].strip(),
            speaker=row[speaker].strip() or None,
            dialogue=row[dialogue].strip(),
            turn=turns[i],
            where=f"{path.name} line {line}",
        )

    return [Table(path, split, len(rows), sample)]


def _decode(path: Path, notes: list[str]) -> str:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        notes.append(f"{path.name}: some lines are not UTF-8 and were read as Windows-1252")
        return "".join(decode_legacy_text(line) for line in raw.splitlines(keepends=True))
