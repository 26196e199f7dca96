"""One config over values and seeds: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trainer.commands.launching import DryRun
from trainer.commands.shared import ConfigFile, Debug, Json, Overrides, print_json, say, wide

if TYPE_CHECKING:
    from launch.sweep import Sweep

app = typer.Typer()


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="a run for each of these, such as 1,2,3")] = "0",
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="a run for each of these, such as model.fusion.width=128,256; repeatable", metavar="KEY=V1,V2"
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="runs at once; they share cores and GPUs")] = 1,
    procs: Annotated[int, typer.Option(min=1, help="processes of each run")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="folder of the sweep; default runs/<config>-sweep", metavar="DIR")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Train a config with every seed and every combination of values. The same command continues it.

    Finished runs are not run again. A run that fails does not end the others. A stop signal stops all of them with
    checkpoints: exit code 85.
    """
    from launch.sweep import Sweep, expand, parse_seeds

    chosen = parse_seeds(seeds, overrides or [])
    plan = Sweep(out or Path("runs") / f"{config.stem}-sweep", expand(config, overrides or [], values or []), chosen)
    return start(plan, parallel, procs, dry_run=dry_run, as_json=as_json, debug=debug)


def start(plan: Sweep, parallel: int, procs: int, *, dry_run: bool, as_json: bool, debug: bool) -> int:
    """Make the runs on this machine, or tell what would be made."""
    from launch.pool import Budget, visible_gpus
    from launch.sweep import finished, open_record
    from launch.sweep_local import run_sweep, table, to_json
    from trainer.run.logs import set_up_logging

    budget = Budget(parallel, procs, gpus=visible_gpus())
    if dry_run:
        open_record(plan)
        done = finished(plan.children())
        wide().print(_planned(plan, done))
        variables = budget.environment(0)
        told = [f"{key}={variables[key]}" for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if key in variables]
        say(
            f"{len(plan.children()) - len(done)} runs to make, {parallel} at once, each of {procs} process(es) with {', '.join(told)}"
        )
        return 0
    set_up_logging(None, 0, debug=debug)
    result = run_sweep(plan, budget, say, debug=debug)
    if as_json:
        print_json(to_json(plan, result))
    else:
        wide().print(table(result.lines))
    return result.code


def _planned(plan: Sweep, done: set[str]) -> Table:
    variants = plan.plan()["variants"]
    shown = Table("run", "", "differs in", title=f"{plan.folder}", title_justify="left")
    for child in plan.children():
        differs = ", ".join(f"{key}={value}" for key, value in variants[child.variant].items())
        shown.add_row(child.name, "done" if child.name in done else "", differs)
    return shown
