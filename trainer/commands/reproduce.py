"""A suite of runs and the tables they make: reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.shared import Debug, Json, Overrides, print_json, say, wide

if TYPE_CHECKING:
    from trainer.results.printable import Table

app = typer.Typer()


@app.command()
def reproduce(
    suite: Annotated[str, typer.Option(help="diagnostic, paper, … (egmf config list), or a suite's YAML file")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the suite; default runs/<suite>", metavar="DIR")] = None,
    data: Annotated[Path | None, typer.Option(help="prepared datasets, DIR/<task>", metavar="DIR")] = None,
    seeds: Annotated[str | None, typer.Option(help="instead of the suite's, such as 1,2,3")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="runs at once; they share cores and GPUs")] = 1,
    procs: Annotated[int, typer.Option(min=1, help="processes of each run")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check every run, say what it takes and what is missing, and stop")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="for --dry-run: GPUs of a run")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="for --dry-run: of one GPU, GiB")] = 80.0,
    tflops: Annotated[float | None, typer.Option(help="for --dry-run: reached on each GPU, for the hours")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Make all runs of a suite, and its tables. The same command continues it; finished runs are not run again.

    The tables are printed, and written to reproduce.md and reproduce.json in the suite's folder.
    """
    from launch.sweep.pool import Budget, visible_gpus
    from launch.sweep.reproduce import Machine, make_sweep, reproduce, verdict
    from launch.sweep.suites import load_suite
    from launch.sweep.sweep import parse_seeds
    from trainer.logs import set_up_logging

    loaded = load_suite(suite)
    chosen = loaded.seeds if seeds is None else parse_seeds(seeds, overrides or [])
    sweep = make_sweep(loaded, out or Path("runs") / Path(suite).stem, data, chosen, overrides or [])
    budget = Budget(parallel, procs, gpus=visible_gpus())
    if dry_run:
        return _dry_run(loaded, sweep, budget, Machine(gpus, gpu_memory, tflops))
    set_up_logging(None, 0, debug=debug)
    code, tables = reproduce(loaded, sweep, budget, say, debug=debug)
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


def _dry_run(suite: Any, sweep: Any, budget: Any, machine: Any) -> int:
    from launch.sweep.reproduce import costs, hours, missing
    from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    say(f"{suite.title}: {hours(suite, sweep, budget)}")
    for child in sweep.children():
        say(f"  {child.out}")
    if suite.generate:
        made = ", ".join(one.task for one in suite.generate)
        say(f"the data ({made}) are generated into {sweep.folder / 'data'}")
    table, notes = costs(sweep, machine)
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
