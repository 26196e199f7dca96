"""Processes that die or hang cost their item alone, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.processes import environment
from tests.features import worker_functions as functions
from trainer.features.types import ClipError
from trainer.features.worker_pool import WorkerError, run_in_processes


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert [c for c in left if "resource_tracker" not in " ".join(c.cmdline())] == []


def kinds(items: list[str | int], **options: object) -> dict[str | int, tuple[str, str]]:
    """Kind and words of each item; `value` where it went well."""
    answers = {}
    for item, outcome in run_in_processes(functions.misbehave, items, **options):  # type: ignore[arg-type]
        answers[item] = (outcome.kind, str(outcome)) if isinstance(outcome, ClipError) else ("value", str(outcome))
    return answers


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_item_has_its_value(workers: int) -> None:
    answers = dict(run_in_processes(functions.square, range(20), workers=workers))
    assert answers == {number: number * number for number in range(20)}
    assert dict(run_in_processes(functions.square, [], workers=workers)) == {}


def test_it_is_always_another_process() -> None:
    ((_, one),) = run_in_processes(functions.pid, [0], workers=0)
    assert one != os.getpid()
    assert len({process for _, process in run_in_processes(functions.pid, range(6), workers=2)}) == 2


def test_one_that_dies_is_told_and_the_others_go_on() -> None:
    answers = kinds([0, "segfault", 1, "signal", 2, "exit", "raise", 3, "told", "kill", 4], workers=2)
    assert {item for item, (kind, _) in answers.items() if kind == "value"} == {0, 1, 2, 3, 4}
    assert answers["segfault"] == ("crashed", "the process that read it was ended by SIGSEGV")
    assert answers["signal"] == answers["segfault"]
    assert answers["exit"] == ("crashed", "the process that read it ended with exit code 5")
    assert answers["kill"][0] == "crashed"
    assert "SIGKILL" in answers["kill"][1]
    assert answers["raise"][0] == "crashed"
    assert "KeyError at worker_functions.py:" in answers["raise"][1]
    assert answers["told"] == ("unreadable", "it is a text")


def test_one_that_hangs_is_told_and_the_others_go_on() -> None:
    started = time.monotonic()
    answers = kinds([0, "sleep", 1, 2], workers=2, time_limit=1.0)
    assert time.monotonic() - started < 8
    assert answers["sleep"] == ("timed out", "took longer than the time limit of 1 seconds")
    assert {item for item, (kind, _) in answers.items() if kind == "value"} == {0, 1, 2}


def test_one_that_hangs_and_ignores_signals() -> None:
    answers = kinds(["spin", 1], workers=1, time_limit=0.5)
    assert answers["spin"][0] == "timed out"
    assert answers[1][0] == "value"


def test_one_that_takes_too_much_memory() -> None:
    answers = kinds(["memory", 1], workers=1, memory_limit=300 << 20)
    assert answers["memory"][0] == "crashed"
    assert "more than 0.29" in answers["memory"][1]
    assert answers[1][0] == "value"


def test_what_is_built_is_built_once_in_each_process() -> None:
    seen = [
        v
        for _, v in run_in_processes(
            functions.built_here, range(8), workers=2, initializer=functions.build, arguments=("encoder",)
        )
    ]
    assert {tuple(names) for _, names in seen} == {("encoder",)}


def test_what_cannot_be_built_is_one_error() -> None:
    for what, error in (("value", ValueError), ("key", WorkerError)):
        with pytest.raises(error, match=f"no {what}"):
            list(run_in_processes(functions.square, [1], initializer=functions.cannot_build, arguments=(what,)))
    with pytest.raises(WorkerError, match="before they began"):
        list(run_in_processes(functions.square, [1, 2], initializer=functions.dies_at_once))


def test_items_are_taken_when_they_are_needed() -> None:
    taken = []

    def endless() -> Iterator[int]:
        for number in range(10**9):
            taken.append(number)
            yield number

    outcomes = run_in_processes(functions.square, endless(), workers=2)
    for _ in range(10):
        next(outcomes)
    assert len(taken) <= 10 + 2 * 2
    outcomes.close()  # type: ignore[attr-defined]


def test_a_value_that_cannot_be_pickled_costs_its_item() -> None:
    answers = kinds(["unpicklable", 1])
    assert answers["unpicklable"][0] == "crashed"
    assert "pickle" in answers["unpicklable"][1]
    assert answers[1][0] == "value"


_MAIN = """
import sys
from tests.features import worker_functions as functions
from trainer.features.worker_pool import run_in_processes
if __name__ == "__main__":
    for _ in run_in_processes(functions.note_and_sleep, [sys.argv[1]] * 4, workers=2):
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_none_outlives_the_main_process(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    (tmp_path / "main.py").write_text(_MAIN)
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "seen")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, env=environment()) as main:
        _until(lambda: len(list((tmp_path / "seen").iterdir())) == 2)
        main.send_signal(number)
        main.wait(10)
    workers = [int(path.name) for path in (tmp_path / "seen").iterdir()]
    _until(lambda: not any(psutil.pid_exists(worker) for worker in workers))
    assert main.returncode == {signal.SIGINT: -2, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]


def _until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
