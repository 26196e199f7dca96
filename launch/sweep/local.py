"""A sweep on this machine: what is not done yet, several runs at once, each reported when it begins and ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict, cast

from rich.table import Table
from rich.text import Text

from launch.start.local import explain_signal, run_state
from launch.sweep.messages import RunResult
from launch.sweep.mlflow_parent import ParentRun
from launch.sweep.pool import Budget, Pool
from launch.sweep.record import SweepRecord, open_record, write_record
from launch.sweep.sweep import Child, Sweep, finished, write_configs
from trainer.distributed.launcher import STOPPED
from trainer.files import load_json
from trainer.results.printable import printable
from trainer.results.run_folder import is_run, read_run
from trainer.results.runs import STYLES, run_line
from trainer.run.folder import hold

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunLine:
    """The state of a sweep's run. `value` is the selecting metric on the validation split at the chosen checkpoint."""

    name: str
    variant: str
    seed: int
    path: str
    state: str  # done, stopped, failed, waiting
    why: str | None
    metric: str | None
    value: float | None
    fold: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """Exit code (0 all done, 1 some failed, 85 stopped and resumable) and the state of every run."""

    code: int
    runs: list[RunLine]


class SweepJson(TypedDict):
    """What ``egmf sweep --json`` prints; `runs` holds the fields of :class:`RunLine`."""

    folder: str
    runs: list[dict[str, str | int | float | None]]


def run_sweep(sweep: Sweep, budget: Budget, say: Say, *, debug: bool = False) -> SweepResult:
    """Make all runs that are not done, and go on with those that were interrupted.

    Raises:
        ValueError: the folder holds another sweep, is in use, or cannot be written; or a finished run is another one.
    """
    with hold(sweep.folder):
        record = open_record(sweep)
        done = finished(sweep.children())
        record.update(cast(SweepRecord, sweep.plan()))
        write_record(sweep, record)
        parent = begin_parent(sweep, record)
        children = sweep.children(parent.run_id)
        todo = [child for child in children if child.name not in done]
        write_configs(todo)
        reporter = _Reporter(children, done, budget, say)
        pool = Pool(budget, sweep.folder, reporter.on_start, reporter.on_end, debug=debug)
        code: int | None = None
        try:
            pool.run(todo)
            code = _code(pool.stopping, children, reporter.failures)
        finally:
            parent.end({0: "done", STOPPED: "stopped"}.get(code if code is not None else 1, "failed"))
        return SweepResult(code, run_lines(children, reporter.failures))


def run_lines(children: Sequence[Child], failures: dict[str, str]) -> list[RunLine]:
    """The state of every run; `failures`: why those failed that ended just now."""
    found = []
    for child in children:
        state = "failed" if child.name in failures else run_state(child.out).state or "waiting"
        metric = value = None
        if is_run(child.out):
            line = run_line(read_run(child.out, predictions=False))
            metric, value = line.metric, line.value
            state = state if child.name in failures or line.state != "lost" else "lost"
        seed = child.config.train.seed
        why = failures.get(child.name)
        found.append(RunLine(child.name, child.variant, seed, str(child.out), state, why, metric, value, child.fold))
    return found


def table(lines: Sequence[RunLine]) -> Table:
    """For the terminal."""
    table = Table("run", "state", "valid", "")
    table.columns[2].justify = "right"
    for line in lines:
        state = Text(line.state, STYLES.get(line.state, ""))
        if line.why:
            state.append("  " + printable(line.why.splitlines()[0]), "dim")
        value = "-" if line.value is None else f"{line.value:.4f}"
        table.add_row(Text(printable(line.name)), state, value, line.metric or "")
    return table


def to_json(sweep: Sweep, result: SweepResult) -> SweepJson:
    return {"folder": str(sweep.folder), "runs": [asdict(line) for line in result.runs]}


class _Reporter:
    """Says when runs begin and end, and keeps why they failed."""

    def __init__(self, children: Sequence[Child], done: set[str], budget: Budget, say: Say) -> None:
        self.failures: dict[str, str] = {}
        self._say, self._total, self._done, self._parallel = say, len(children), len(done), budget.parallel
        self._started: dict[str, float] = {}
        self._seconds: list[float] = []
        if done:
            say(f"{len(done)} of {len(children)} runs are done already")

    def on_start(self, child: Child) -> None:
        self._started[child.name] = time.monotonic()
        self._say(f"{child.name}: begins; log: {child.out / 'log.txt'}")

    def on_end(self, child: Child, result: RunResult) -> None:
        seconds = time.monotonic() - self._started[child.name]
        state = run_state(child.out).state
        if result.code == 0 and state == "done":
            self._done += 1
            self._seconds.append(seconds)
            self._say(f"{child.name}: done in {seconds:.0f} s; {self._left()}")
        elif result.code == STOPPED:
            self._say(f"{child.name}: stopped after {seconds:.0f} s")
        else:
            self.failures[child.name] = reason = result.failure or _failure(child, result)
            self._say(f"{child.name}: failed after {seconds:.0f} s: {reason}")

    def _left(self) -> str:
        left = self._total - self._done - len(self.failures)
        minutes = left * sum(self._seconds) / len(self._seconds) / self._parallel / 60
        return f"{self._done} of {self._total} done" + (f", about {minutes:.0f} min left" if left else "")


def _failure(child: Child, result: RunResult) -> str:
    if result.code < 0:
        number = -result.code
        return f"signal {signal.Signals(number).name}: {explain_signal(number)}"
    try:
        recorded = load_json((child.out / "run.json").read_text(encoding="utf-8")).get("failure")
    except (OSError, ValueError):
        recorded = None
    return str(recorded or f"exit code {result.code}; see the logs in {child.out} and worker-*.log beside it")


def _code(stopping: bool, children: Sequence[Child], failures: dict[str, str]) -> int:
    if all(run_state(child.out).state == "done" for child in children):
        return 0
    return STOPPED if stopping or not failures else 1


def begin_parent(sweep: Sweep, record: SweepRecord) -> ParentRun:
    """The sweep's own MLflow run; its id goes into the record."""
    config = next(iter(sweep.variants.values()))
    known = record["mlflow"]
    parent = ParentRun(sweep.folder, config.track, record["key"], known["run_id"] if known else None)
    plan = sweep.plan()
    swept = sorted({key for values in plan["variants"].values() for key in values})
    params = {"sweep.seeds": ",".join(map(str, plan["seeds"])), "sweep.variants": "; ".join(plan["variants"])}
    if "folds" in plan:
        params["sweep.folds"] = ",".join(plan["folds"])
    params.update({f"sweep.{key}": "; ".join(str(v.get(key)) for v in plan["variants"].values()) for key in swept})
    parent.begin(params, sweep.record)
    if parent.run_id is not None:
        record["mlflow"] = {"uri": parent.uri, "run_id": parent.run_id}
        write_record(sweep, record)
    return parent
