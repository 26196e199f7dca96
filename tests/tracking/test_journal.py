"""The journal: what is written is read back, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.processes import ROOT, environment
from trainer.tracking.journal import Journal, entries, read_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_lines_are_as_documented(path: Path) -> None:
    before = time.time()
    journal = Journal(path)
    journal.metrics({"train/loss": 0.5, "undefined": None, "nan": math.nan, "inf": -math.inf, "n": 3}, 7)
    journal.metrics({"nothing": None}, 8)
    journal.note({"kind": "artifact", "path": "metrics.json", "folder": None})
    journal.close()
    metrics, artifact = (json.loads(line) for line in path.read_text().splitlines())
    assert before <= metrics.pop("time") <= artifact.pop("time") <= time.time()
    assert metrics == {"step": 7, "metrics": {"train/loss": 0.5, "n": 3.0}}
    assert artifact == {"kind": "artifact", "path": "metrics.json", "folder": None}
    assert read_journal(path) == {"train/loss": [(7, 0.5)], "n": [(7, 3.0)]}


def test_it_is_on_disk_before_the_call_returns(path: Path) -> None:
    journal = Journal(path)
    journal.metrics({"loss": 1.0}, 1)
    assert read_journal(path) == {"loss": [(1, 1.0)]}
    journal.close()


Logged = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.one_of(st.none(), st.floats(width=64))), max_size=40
)


@given(logged=Logged, processes=st.integers(1, 3), torn=st.integers(0, 3))
def test_the_first_value_of_a_step_counts(
    tmp_path_factory: pytest.TempPathFactory, logged: list[tuple[str, int, float | None]], processes: int, torn: int
) -> None:
    """Against a plain dictionary, over several processes, each of which may have been killed in the middle of a line."""
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    expected: dict[str, dict[int, float]] = {}
    for part in range(processes):
        journal = Journal(path)
        for name, step, value in logged[part::processes]:
            journal.metrics({name: value}, step)
            if value is not None and math.isfinite(value):
                expected.setdefault(name, {}).setdefault(step, value)
        journal.close()
        with path.open("ab") as file:
            file.write(b'{"step": 3, "metr'[: 6 * torn])
    assert read_journal(path) == {name: sorted(values.items()) for name, values in expected.items()}
    whole = [record for _, record in entries(path) if record is not None]
    assert sum(len(record["metrics"]) for record in whole) == sum(map(len, expected.values()))


def test_a_retrained_step_must_come_to_the_same_values(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Journal(path)
    for step in (1, 2, 3):
        first.metrics({"loss": 1 / step, "samples_per_second": 10.0, "system/cpu": 5.0}, step)
    first.close()
    again = Journal(path)
    again.metrics({"loss": 1 / 2, "samples_per_second": 11.0, "system/cpu": 6.0}, 2)
    assert again.differences == 0
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        again.metrics({"loss": math.nextafter(1 / 3, 1)}, 3)
        again.metrics({"loss": 7.0}, 1)
        again.metrics({"loss": 0.25}, 4)
    again.close()
    assert again.differences == 2
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "step 3, trained again, gives another loss: 0.33333333333333337, and 0.3333333333333333 before"
    ]
    assert read_journal(path)["loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert read_journal(path)["samples_per_second"] == [(1, 10.0), (2, 10.0), (3, 10.0)]


def test_a_torn_line_is_removed_and_a_damaged_one_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b'{"step": 1, "time": 0.0, "metrics": {"a": 1.0}}\n\0\0\0\n{"step": 2, "time": 0.0, "metr')
    assert read_journal(path) == {"a": [(1, 1.0)]}
    journal = Journal(path)
    assert "the torn line is removed" in caplog.text
    assert "is damaged and left out" in caplog.text
    journal.metrics({"a": 2.0}, 2)
    journal.close()
    assert read_journal(path) == {"a": [(1, 1.0), (2, 2.0)]}


def test_no_journal_is_empty(path: Path) -> None:
    assert read_journal(path) == {}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from trainer.tracking.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path(sys.argv[1]))
journal.metrics({"a": 1.0}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 20, resource.RLIM_INFINITY))
try:
    journal.metrics({"a": 2.0}, 2)
except OSError as error:
    print(type(error).__name__, error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.metrics({"a": 2.5}, 2)
journal.metrics({"a": 3.0}, 3)
"""


def test_a_full_disk_is_an_error_and_leaves_whole_lines(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError")
    assert read_journal(path) == {"a": [(1, 1.0), (2, 2.5), (3, 3.0)]}


WRITER = """
import sys
from pathlib import Path
from trainer.tracking.journal import Journal
journal, step = Journal(Path(sys.argv[1])), 0
while True:
    step += 1
    journal.metrics({"a": 1 / step, "b": 2.0 * step}, step)
    print(step, flush=True)
"""


def test_a_killed_process_loses_no_step_it_was_done_with(path: Path) -> None:
    done = 0
    for lines in (50, 200, 333):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(lines):
            last = process.stdout.readline()
        process.kill()
        process.wait()
        result = [last, *process.stdout.readlines()]
        done = max([done, *(int(line) for line in result if line.endswith("\n"))])
        found = read_journal(path)
        assert [step for step, _ in found["a"]] == list(range(1, len(found["a"]) + 1))
        assert found["a"] == [(step, 1 / step) for step, _ in found["a"]]
        assert len(found["a"]) >= done


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "metrics": 3}',
        '{"step": 2, "metrics": {"a": "much"}}',
        '{"metrics": {"a": 1.0}}',
        '{"step": [], "metrics": {"a": 1.0}}',
        "[1]",
    ],
)
def test_lines_of_another_form_are_left_out(path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text('{"step": 1, "time": 0.0, "metrics": {"a": 1.0}}\n' + line + "\n")
    assert read_journal(path) == {"a": [(1, 1.0)]}
    assert "is damaged and left out" in caplog.text
