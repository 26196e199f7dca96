"""Samples to be predicted, in other encodings than UTF-8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.inputs import open_input
from trainer.tasks import get_task

LINES = [{"id": "a", "text": "今天我真的很高兴"}, {"id": "b", "text": "别走，等等我"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
def test_json_lines_to_be_predicted(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode(encoding))
    tasks = {"cherma": TaskInput(get_task("cherma"), {}, {})}
    with open_input([path], tasks, reread=True) as given:
        for _ in range(2):
            samples = list(given.samples())
            assert [(s.raw.id, s.raw.text) for s in samples if s.raw] == [(line["id"], line["text"]) for line in LINES]
            assert not any(s.faults for s in samples)
        assert bool(given.notes) == (encoding in ("gbk", "utf-16"))


def test_a_line_in_an_unknown_encoding_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": "a", "text": "fine"}\n{"id": "b", "text": "\xe9\xea\xeb"}\n')
    with open_input([path], {"meld": TaskInput(get_task("meld"), {}, {})}) as given:
        first, second = given.samples()
    assert first.raw is not None
    assert second.raw is None
    assert "UTF-8" in second.faults[0] or "unicode" in second.faults[0], second.faults
