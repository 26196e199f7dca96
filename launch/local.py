"""Several processes on this machine, through torchrun's elastic agent.

The agent is used and not the deepspeed launcher, since it ends every process when one fails, reports the first cause,
and leaves nothing in shared memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

STOPPED = 85


def command(config: Path, overrides: Sequence[str], out: Path, procs: int, *, debug: bool = False) -> list[str]:
    """The command that trains `config` on `procs` processes of this machine."""
    run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={procs}"] if procs > 1 else []
    module = ["--module", "trainer"] if run else ["trainer"]
    more = ["--debug"] if debug else []
    return [sys.executable, "-m", *run, *module, "train", str(config), "--out", str(out), *more, *overrides]


def launch(line: Sequence[str], out: Path) -> int:
    """Run it and wait. Signals are passed on. Returns the run's exit code, judged by its own completion marker."""
    environment = dict(os.environ)
    cores = os.cpu_count() or 1
    procs = next((int(word.partition("=")[2]) for word in line if word.startswith("--nproc-per-node=")), 1)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // procs)))
    child = subprocess.Popen(line, env=environment, start_new_session=True)
    before = {}
    for name in (signal.SIGTERM, signal.SIGINT):
        before[name] = signal.signal(name, lambda number, _: child.send_signal(number))
    try:
        code = child.wait()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    return _judge(code, out)


def _judge(code: int, out: Path) -> int:
    """torchrun turns the workers' codes into 1: the run's record says how it ended."""
    try:
        state = json.loads((out / "run.json").read_text(encoding="utf-8")).get("state")
    except (OSError, ValueError):
        return code or 1
    if state == "stopped":
        return STOPPED
    if state == "done" and code == 0:
        return 0
    return code if code > 0 else 1
