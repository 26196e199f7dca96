"""A forked process is what an executed one is: everything that it can see of itself, its exit code and its children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.fork_server import ForkedProcess, start
from tests.distributed.processes import ROOT, environment, restore_interrupts

PROBE = """
import json, logging, os, random, signal, sys, threading
import numpy, torch
def handler(number):
    held = signal.getsignal(number)
    return held if held is None or isinstance(held, int) else held.__name__
seen = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "executable": sys.executable, "flags": list(sys.flags),
    "cwd": os.getcwd(), "environment": dict(os.environ), "main": __name__, "spec": [__spec__.name, __spec__.origin] if __spec__ else None, "file": globals().get("__file__"),
    "signals": {int(n): handler(n) for n in signal.valid_signals()}, "mask": [int(n) for n in signal.pthread_sigmask(0, [])],
    "files": sorted(os.listdir("/proc/self/fd"))[:-1], "input": sys.stdin.read(), "leader": os.getpid() == os.getsid(0),
    "umask": os.umask(0o22), "own": sorted(n for n in sys.modules if n.partition(".")[0] in ("trainer", "launch", "benchmarks")),
    "custom": getattr(sys.modules.get("sitecustomize"), "__file__", None), "planted": getattr(sys, "planted", None),
    "python threads": threading.active_count(), "threads": torch.get_num_threads(), "log": str(logging.root.handlers),
    "terminal": sys.stdout.isatty(), "encodings": [s.encoding + s.errors for s in (sys.stdin, sys.stdout, sys.stderr)],
    "dtype": str(torch.get_default_dtype()),
}
print(json.dumps(seen))
print("to stderr", file=sys.stderr)
"""
ENDINGS = {
    "to the end": "pass",
    "a code": "raise SystemExit(85)",
    "a message": "import sys; sys.exit('why')",
    "an exception": "raise KeyError('what')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "terminated": "import os; os.kill(os.getpid(), 15)",
    "interrupted": "import os, signal; signal.raise_signal(signal.SIGINT)",
    "at once": "import os; os._exit(7)",
    "a hook": "import sys\nsys.excepthook = lambda *_: print('hooked', file=sys.stderr)\n1 / 0",
    "at exit": "import atexit; atexit.register(print, 'last words')",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()",
}
NESTED = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
child = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, "RANK": "1"})
assert os.getpid() == int(open(f"/proc/{child.pid}/stat").read().rsplit(")", 1)[1].split()[1])
child.communicate(b"nested")
sys.exit(child.returncode)
"""


def both(command: list[str], **options: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Exit code, stdout and stderr: forked, and executed."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    found = []
    for one in (start, subprocess.Popen):
        with one(command, **options, **({} if one is start else {"preexec_fn": restore_interrupts})) as process:
            assert isinstance(process, ForkedProcess) == (one is start)
            out, err = process.communicate("some input", timeout=120)
        found.append((process.returncode, out, err))
    return found[0], found[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "nested.py").write_text(NESTED)
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nsys.planted = os.environ.get('RANK')\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["module", "program", "file"])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_forked_process_sees_what_an_executed_one_sees(place: Path, kind: str, threads: str) -> None:
    words = {"module": ["-m", "probe"], "program": ["-c", PROBE], "file": [str(place / "probe.py")]}[kind]
    env = environment(PYTHONPATH=f"{place}{os.pathsep}{ROOT}", OMP_NUM_THREADS=threads, RANK="5", EGMF_X="y")
    forked, executed = both(
        [sys.executable, *words, "an argument", "--more"], cwd=place, env=env, start_new_session=True
    )
    assert forked[0] == executed[0] == 0, forked[2]
    assert json.loads(forked[1]) == json.loads(executed[1])
    assert forked[2] == executed[2] == "to stderr\n"
    assert json.loads(forked[1])["planted"] == "5"


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_as_an_executed_one_does(ending: str) -> None:
    forked, executed = both([sys.executable, "-c", ENDINGS[ending]], env=environment(), cwd=ROOT)
    assert forked[:2] == executed[:2]
    assert forked[2].splitlines()[-1:] == executed[2].splitlines()[-1:]


def test_no_two_processes_draw_the_same_random_numbers() -> None:
    program = "import random, numpy, torch; print(random.random(), numpy.random.rand(), float(torch.rand(1)))"
    drawn = []
    for _ in range(2):
        with start([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True) as process:
            assert isinstance(process, ForkedProcess)
            drawn.append(process.communicate(timeout=120)[0].split())
    assert len(drawn[0]) == len(drawn[1]) == 3
    assert not set(drawn[0]) & set(drawn[1])


def test_its_children_are_forked_in_turn_and_are_its_children(place: Path) -> None:
    env = environment(PYTHONPATH=str(place))
    forked, executed = both([sys.executable, str(place / "nested.py"), "-m", "probe"], cwd=place, env=env)
    assert forked[0] == executed[0] == 0, forked[2]
    seen, expected = json.loads(forked[1]), json.loads(executed[1])
    assert seen == expected
    assert (seen["input"], seen["planted"], seen["leader"]) == ("nested", "1", True)
    forked, executed = both(
        [sys.executable, str(place / "nested.py"), "-c", "raise SystemExit(85)"], cwd=place, env=env
    )
    assert forked[0] == executed[0] == 85


def test_what_a_fork_cannot_give_is_executed() -> None:
    env = environment()
    for command, more in (
        (["/bin/true"], {}),
        ([sys.executable, "-O", "-c", "pass"], {}),
        ([sys.executable, "-c", "pass"], {"HF_HUB_OFFLINE": "1"}),
        ([sys.executable, "-c", "pass"], {"PATH": "/bin"}),
    ):
        with start(command, env={**env, **more}) as process:
            assert not isinstance(process, ForkedProcess)
        assert process.returncode == 0


def test_it_is_stopped_by_signals_and_does_not_outlive_who_started_it() -> None:
    line = [sys.executable, "-c", "import time; time.sleep(600)"]
    with start(line, env=environment()) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    forgotten = start(line, env=environment())
    pid, forgotten.returncode = forgotten.pid, 0
    del forgotten
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
