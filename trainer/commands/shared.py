"""What the commands share: their common options, how they print, and how a process joins a run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trainer.results.printable import format_metric

ConfigFile = Annotated[
    Path, typer.Argument(help="the run's YAML file, or a name of egmf config list", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values that replace the config's, such as train.zero=3", metavar="[KEY=VALUE]..."),
]
Out = Annotated[Path | None, typer.Option(help="run folder; default runs/<config>-s<seed>", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, all else on stderr")]
Force = Annotated[bool, typer.Option("--force", help="continue a run although settings or data differ")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="a module, or .py file, with readers of further formats (repeated); it runs: only code you trust",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the libraries' own messages and full tracebacks")]


def default_out(config: Path, seed: int) -> Path:
    """The run folder of a config where none is given."""
    return Path("runs") / f"{config.stem}-s{seed}"


def in_world(work: Callable[[Any], int], debug: bool, seconds: float | None = None) -> int:
    """`work` in this process's place among the run's; a fault names its rank and ends the process at once.

    `seconds` is how long the processes wait for each other. They end together: a launcher that ends the others when one
    leaves with a code other than 0 would otherwise interrupt what rank 0 writes last.
    """
    from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    from trainer.distributed.process_group import start_world, stop_world, tell_launcher
    from trainer.distributed.rendezvous import SECONDS
    from trainer.distributed.world import PeerFault
    from trainer.logs import set_up_logging

    set_up_logging(None, int(os.environ.get("RANK", "0")), debug=debug)
    try:
        world = start_world(seconds or SECONDS)
    except ValueError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        say(f"error on rank {os.environ.get('RANK', '?')}: {error}")
        tell_launcher(error)
        return 1
    try:
        code = work(world)
        world.barrier()
    except Exception as error:
        if world.size == 1:
            raise
        # leaving the process group would wait for the others; they end when they miss this rank
        lost = isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error))
        if debug or not (lost or isinstance(error, (ValueError, PeerFault))):
            import traceback

            traceback.print_exc()
        why = f"another rank ended, and took the connection along ({lost[0]})" if lost else error
        say(f"error on rank {world.rank}: {why}")
        sys.stderr.flush()
        tell_launcher(error)
        os._exit(1)
    stop_world()
    return code


def check_tasks(names: list[str]) -> None:
    """Refuse unknown tasks before anything heavy is loaded; all of them at once."""
    from trainer.tasks import TaskError, get_task

    faults = []
    for name in names:
        try:
            get_task(name)
        except TaskError as error:
            faults.append(str(error))
    if faults:
        raise TaskError("\n".join(faults))


def print_metrics(results: dict[str, Any]) -> None:
    """A table of the scalar metrics, a column per split and task."""
    columns = {
        (split, task): values
        for split, tasks in results.items()
        if isinstance(tasks, dict)
        for task, values in tasks.items()
    }
    names = list(
        dict.fromkeys(k for v in columns.values() for k, x in v.items() if x is None or isinstance(x, (int, float)))
    )
    table = Table(
        title=f"checkpoint {results['checkpoint']}" if "checkpoint" in results else None, title_justify="left"
    )
    table.add_column("metric")
    for split, task in columns:
        table.add_column(f"{task} {split}", justify="right")
    for name in names:
        table.add_row(name, *(format_metric(values.get(name, "")) for values in columns.values()))
    wide().print(table)


def wide() -> Console:
    """A console that never cuts a table: as wide as it needs where stdout is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


_json_out = 1


def json_out() -> int:
    """The file descriptor of the real stdout."""
    return _json_out


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever this process and its libraries write to stdout goes to stderr; `print_json` keeps the real one."""
    global _json_out
    sys.stdout.flush()
    _json_out = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(_json_out, 1)
        os.close(_json_out)
        _json_out = 1


def print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with os.fdopen(os.dup(_json_out), "w", encoding="utf-8") as stream:
        stream.write(text)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
