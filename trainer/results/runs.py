"""The runs of a folder, each with its state and the reason for it, its step and its selecting metric."""

from __future__ import annotations

import datetime
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.table import Table
from rich.text import Text

from trainer.results.printable import printable
from trainer.results.records import number_or_none
from trainer.results.run_folder import RunFolder, is_run, read_run
from trainer.run.record import RecordValues
from trainer.tracking.journal import JOURNAL

STYLES = {"done": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "lost": "red", "unknown": "red"}


@dataclass(frozen=True)
class State:
    """``running``, ``done``, ``stopped`` or ``failed`` as run.json says; ``lost`` when it says running and the process is
    gone; ``unknown`` without a readable record. `why` is a sentence for people."""

    name: str
    why: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.why}" if self.why else self.name


@dataclass(frozen=True)
class RunLine:
    """A run in a list. `value` is the selecting metric on the validation split at the chosen checkpoint, else the newest;
    `seconds` is the time since the run's last activity."""

    name: str
    path: str
    state: str
    why: str | None
    tasks: list[str]
    step: int | None
    steps: int | None
    metric: str | None
    value: float | None
    started: str | None
    seconds: float | None
    baseline: bool = False  # made by `egmf baseline`, by no training


def list_runs(folder: Path) -> list[RunLine]:
    """The runs in `folder` (which may be one itself), the most recently active first.

    Raises:
        ValueError: no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: egmf runs lists the run folders in a folder (runs by default)")
    paths = [folder] if is_run(folder) else sorted(p for p in folder.iterdir() if p.is_dir() and is_run(p))
    lines = [run_line(read_run(path, predictions=False)) for path in paths]
    return sorted(lines, key=lambda line: (line.seconds is None, line.seconds, line.name))


def run_line(run: RunFolder) -> RunLine:
    state = state_of(run)
    selected = selected_value(run)
    seen = last_sign(run)
    return RunLine(
        name=run.name,
        path=str(run.path),
        state=state.name,
        why=state.why,
        tasks=list(run.tasks) or list(run.record.get("tasks", [])),
        step=run.step,
        steps=run.steps,
        metric=selected.metric,
        value=selected.value,
        started=run.record.get("started"),
        seconds=None if seen is None else max(0.0, (_now() - seen).total_seconds()),
        baseline=run.is_baseline,
    )


def state_of(run: RunFolder) -> State:
    """The state of a run: what its record says, checked against the process that should be running."""
    record = run.record
    name = record.get("state")
    if name == "failed":
        return State("failed", record.get("failure") or "no reason was recorded; see log.txt")
    if name == "stopped":
        return State("stopped", "the same command continues it")
    if name == "running":
        return _running(record)
    return State("done") if name == "done" else State("unknown", "run.json has no state")


def _running(record: RecordValues) -> State:
    pid, host = record.get("pid"), record.get("host")
    if not isinstance(pid, int) or not isinstance(host, str):
        return State("running", "its record has no process")
    if host != socket.gethostname():
        return State("running", f"process {pid} on {host}, which cannot be checked from this machine")
    started = parse_time(record.get("started"))
    try:
        process = psutil.Process(pid)
        # a process that is younger than the run is another program with the same process id
        other = started is not None and process.create_time() > started.timestamp() + 2
        ended = other or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        ended = True
    except psutil.AccessDenied:
        ended = False
    if ended:
        return State("lost", f"run.json says running, but process {pid} is gone; the same command continues it")
    return State("running", f"process {pid}")


@dataclass(frozen=True)
class Selected:
    """The selecting metric on the validation split, at `step`; None where undefined or unknown."""

    metric: str | None = None
    value: float | None = None
    step: int | None = None


def selected_value(run: RunFolder) -> Selected:
    """The selecting metric at the chosen checkpoint, else the newest.

    With several tasks it is the mean over them, as an indication only (metrics of which less is better count negative; the
    checkpoint is chosen by ranks), and undefined while any of them is.
    """
    names = [task.select for task in run.tasks.values()]
    if not names:
        return Selected()
    metric = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
    step = run.chosen_step
    ended = run.results.get("valid", {})
    if set(run.tasks) <= set(ended):
        values = {name: number_or_none(ended[name].get(task.select)) for name, task in run.tasks.items()}
    else:
        series = {name: dict(points) for name, points in run.selected().items()}
        common = set.intersection(*(set(series.get(name, {})) for name in run.tasks))
        step = step if step in common else max(common, default=None)
        values = {name: series[name][step] if step is not None else None for name in run.tasks}
    signed = [
        None if value is None else -value if len(names) > 1 and not run.tasks[name].greater_is_better else value
        for name, value in values.items()
    ]
    known = [value for value in signed if value is not None]
    return Selected(metric, sum(known) / len(known) if len(known) == len(names) else None, step)


def last_sign(run: RunFolder) -> datetime.datetime | None:
    """When a run was last active: its end, else the last line of its journal, else its start."""
    ended = parse_time(run.record.get("ended"))
    journal = run.path / JOURNAL
    if ended is None and journal.is_file():
        return datetime.datetime.fromtimestamp(journal.stat().st_mtime, datetime.timezone.utc)
    return ended or parse_time(run.record.get("started"))


def runs_table(lines: list[RunLine]) -> Table:
    """The list for the terminal."""
    table = Table("run", "state", "task", "step", "valid", "", "last active", title_justify="left")
    for column in (3, 5, 6):
        table.columns[column].justify = "right"
    for line in lines:
        state = Text(line.state, STYLES.get(line.state, ""))
        if line.why and line.state != "done":
            state.append("  " + printable(line.why), "dim")
        table.add_row(
            Text(printable(line.name)),
            state,
            Text(", ".join(line.tasks)),
            "baseline" if line.baseline else steps_text(line.step, line.steps),
            line.metric or "",
            "-" if line.value is None else f"{line.value:.4f}",
            "-" if line.seconds is None else f"{age(line.seconds)} ago",
        )
    return table


def lines_json(lines: list[RunLine]) -> dict[str, list[dict[str, object]]]:
    return {"runs": [asdict(line) for line in lines]}


def steps_text(step: int | None, steps: int | None) -> str:
    return f"{'-' if step is None else step} of {'?' if steps is None else steps}"


def age(seconds: float) -> str:
    """Seconds in the largest unit that fits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def parse_time(text: str | None) -> datetime.datetime | None:
    """A time of a record (ISO 8601; UTC where it has no zone); None where it is absent or damaged."""
    if text is None:
        return None
    try:
        value = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
