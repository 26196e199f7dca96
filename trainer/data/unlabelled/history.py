"""What must be remembered of earlier samples, in bounded memory: ids, and what was said in dialogues."""

from __future__ import annotations

import json
import sqlite3

from trainer.data.readers.raw import RawSample


class SeenSamples:
    """A temporary SQLite database that moves to disk as it grows. `order` is a sample's place in the whole input."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", check_same_thread=False)  # one thread at a time uses it
        self._base.execute("CREATE TABLE ids (task, id, place, PRIMARY KEY (task, id)) WITHOUT ROWID")
        self._base.execute(
            "CREATE TABLE utterances (task, id, dialogue, turn, sequence, speaker, text, UNIQUE (task, id))"
        )
        self._base.execute("CREATE INDEX place ON utterances (dialogue, turn, sequence)")

    def close(self) -> None:
        self._base.close()

    def first_place(self, task: str, id: str, where: str) -> str | None:
        """Remember an id; where it stood before, if it did."""
        done = self._base.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", (task, id, where))
        if done.rowcount:
            return None
        return str(self._base.execute("SELECT place FROM ids WHERE task = ? AND id = ?", (task, id)).fetchone()[0])

    def remember_utterance(self, task: str | None, order: int, raw: RawSample) -> None:
        """Remember what a sample of a dialogue says."""
        text = (raw.text or "").strip()
        if raw.dialogue is not None and raw.id and text:
            row = (task, raw.id, _dialogue(task, raw), raw.turn, order, raw.speaker or "", text)
            self._base.execute("INSERT OR IGNORE INTO utterances VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def history(self, task: str | None, order: int, raw: RawSample, limit: int) -> list[tuple[str, str]]:
        """(speaker, text) of the at most `limit` utterances before a sample, oldest first.

        As in :class:`trainer.data.conversations.Conversations`: by turn, or by place where the dialogue has no turns.
        """
        if raw.dialogue is None:
            return []
        dialogue = _dialogue(task, raw)
        where, place = "turn IS NOT NULL AND turn < ?", raw.turn
        if place is None:
            numbered = "SELECT 1 FROM utterances WHERE dialogue = ? AND turn IS NOT NULL LIMIT 1"
            if self._base.execute(numbered, (dialogue,)).fetchone():
                return []
            where, place = "sequence < ?", order
        query = (
            f"SELECT speaker, text FROM utterances WHERE dialogue = ? AND {where} "
            "ORDER BY turn DESC, sequence DESC LIMIT ?"
        )
        return self._base.execute(query, (dialogue, place, limit)).fetchall()[::-1]


def _dialogue(task: str | None, raw: RawSample) -> str:
    """A dialogue's name, told apart by task and split: the corpora count anew in each."""
    return json.dumps([task, raw.split, raw.dialogue])
