"""Before a run: check machine, versions, data, model and ranks. ``egmf doctor``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import Debug, Json, Out, Overrides, default_out
from trainer.commands.output import print_json, say, wide
from trainer.commands.ranks import run_as_rank

if TYPE_CHECKING:
    from launch.doctor.findings import Check
    from trainer.distributed.world import World

app = typer.Typer()
COLOURS = {"ok": "green", "warning": "yellow", "fault": "bold red", "skipped": "dim"}


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="a run's YAML file, or a name of egmf config list", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    procs: Annotated[int | None, typer.Option(min=1, help="ranks to try; default one per GPU, or one")] = None,
    nodes: Annotated[Path | None, typer.Option(help="ask every node of this hostfile", metavar="HOSTFILE")] = None,
    out: Out = None,
    strict: Annotated[bool, typer.Option("--strict", help="warnings count as faults")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Examine machine, GPUs, versions, data, model and ranks. Exit code 0: fine; 1: a fault; 2: usage.

    Started by deepspeed or torchrun (RANK and WORLD_SIZE are set) it uses their ranks; else it starts --procs of its own.
    """
    if nodes is not None and config is None:
        raise typer.BadParameter("--nodes compares the nodes for a run: name its CONFIG too", param_hint="--nodes")
    from trainer.distributed.process_group import quiet_deepspeed
    from trainer.logs import set_up_logging

    quiet_deepspeed()
    set_up_logging(None, int(os.environ.get("RANK", "0")), debug=debug)
    import torch

    from launch.doctor.preflight import examine, examine_here

    place = out or (Path("runs") if config is None else default_out(config, 0))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:

        def work(world: World) -> int:
            checks = examine_here(config, overrides or [], place, world)
            return _show(checks, strict, as_json) if world.is_rank_zero else 0

        return run_as_rank(work, debug)
    count = procs or max(1, torch.cuda.device_count())
    return _show(examine(config, overrides or [], place, count, nodes), strict, as_json)


def _show(checks: list[Check], strict: bool, as_json: bool) -> int:
    """The findings as a table or as JSON; the exit code."""
    from rich.table import Table
    from rich.text import Text

    from launch.doctor.findings import worst_state

    states = [check.state for check in checks]
    faults, warnings = states.count("fault"), states.count("warning")
    if as_json:
        found = [check.model_dump() for check in checks]
        print_json({"state": worst_state(checks), "faults": faults, "warnings": warnings, "checks": found})
    else:
        table = Table("", "check", "", "found", "what to do")
        for check in checks:
            mark = Text(check.state, style=COLOURS[check.state])
            table.add_row(check.part, check.name, mark, Text(check.found), Text(check.advice))
        wide().print(table)
        say(f"{faults} fault(s), {warnings} warning(s) in {len(checks)} checks")
    return 1 if faults or (strict and warnings) else 0
