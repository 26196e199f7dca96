"""A suite of runs and the tables they make: reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import Debug, Json, Overrides, option_groups
from trainer.commands.output import print_json, say, wide

if TYPE_CHECKING:
    from launch.sweep.pool import Budget
    from launch.sweep.suites import Suite
    from launch.sweep.sweep import Sweep
    from trainer.results.printable import Table

app = typer.Typer()


@dataclass(frozen=True)
class PlannedMachine:
    """The GPUs that --dry-run plans a run for; a field is an option."""

    gpus: Annotated[int, typer.Option(min=1, help="for --dry-run: GPUs of a run")] = 8
    gpu_memory: Annotated[float, typer.Option(help="for --dry-run: memory of one GPU, GiB")] = 80.0
    tflops: Annotated[float | None, typer.Option(help="for --dry-run: achieved on each GPU, for the hours")] = None


PLANNED_MACHINE = PlannedMachine()


@app.command()
@option_groups
def reproduce(
    suite: Annotated[str, typer.Option(help="diagnostic, paper, … (egmf config list), or a suite's YAML file")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the suite; default runs/<suite>", metavar="DIR")] = None,
    data: Annotated[Path | None, typer.Option(help="prepared datasets, DIR/<task>", metavar="DIR")] = None,
    seeds: Annotated[str | None, typer.Option(help="instead of the suite's, such as 1,2,3")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="runs at once; they share cores and GPUs")] = 1,
    procs: Annotated[int, typer.Option(min=1, help="processes of each run")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check every run, print its cost and what is missing, and stop")
    ] = False,
    machine: PlannedMachine = PLANNED_MACHINE,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a suite and make its tables. The same command continues it; finished runs are not run again.

    The tables are printed, and written to reproduce.md and reproduce.json in the suite's folder.
    """
    from launch.sweep.grid import parse_seeds
    from launch.sweep.pool import Budget, visible_gpus
    from launch.sweep.reproduce import make_sweep
    from launch.sweep.suites import load_suite

    loaded = load_suite(suite)
    chosen = loaded.seeds if seeds is None else parse_seeds(seeds, overrides or [])
    sweep = make_sweep(loaded, out or Path("runs") / Path(suite).stem, data, chosen, overrides or [])
    budget = Budget(parallel, procs, gpus=visible_gpus())
    if dry_run:
        return _show_plan(loaded, sweep, budget, machine)
    return _run(loaded, sweep, budget, as_json=as_json, debug=debug)


def _run(suite: Suite, sweep: Sweep, budget: Budget, *, as_json: bool, debug: bool) -> int:
    from launch.sweep.reproduce import reproduce, verdict
    from trainer.logs import set_up_logging

    set_up_logging(None, 0, debug=debug)
    code, tables = reproduce(suite, sweep, budget, say, debug=debug)
    if tables is None:
        say("no run that the others are compared with is done: there is no table yet")
        return code
    if as_json:
        print_json({**tables.values, "notes": tables.notes})
        return code
    for table in tables.tables:
        _print(table)
    for claim in tables.claims:
        say(f"{verdict(claim.met)}: {claim.expected}: {claim.found}")
    for note in tables.notes:
        say(note)
    say(f"written: {sweep.folder / 'reproduce.md'}, reproduce.json")
    return code


def _show_plan(suite: Suite, sweep: Sweep, budget: Budget, machine: PlannedMachine) -> int:
    from trainer.distributed.light_imports import import_libraries
    from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    import_libraries()
    from launch.sweep.reproduce import Machine, costs, hours, missing

    say(f"{suite.title}: {hours(suite, sweep, budget)}")
    for child in sweep.children():
        say(f"  {child.out}")
    if suite.generate:
        made = ", ".join(one.task for one in suite.generate)
        say(f"the data ({made}) are generated into {sweep.folder / 'data'}")
    table, notes = costs(sweep, Machine(machine.gpus, machine.gpu_memory, machine.tflops))
    if table is not None:
        _print(table)
    for note in notes:
        say(note)
    absent = missing(sweep, generated=bool(suite.generate))
    for what in absent:
        say(f"missing: {what}")
    say("every config is sound" + ("" if absent else ", and nothing is missing"))
    return 0


def _print(table: Table) -> None:
    from trainer.results.printable import rich_table

    wide().print(rich_table(table))
    if table.note:
        say(table.note)
