"""One config over values, seeds and folds: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.arity import command_class
from trainer.commands.options import ConfigFile, Debug, DryRun, Json, Overrides, option_groups
from trainer.commands.output import print_json, say, wide
from trainer.commands.slurm import NOTHING_ASKED, SlurmOptions

if TYPE_CHECKING:
    from rich.table import Table

    from launch.start.slurm import Job, Member
    from launch.sweep.pool import Budget
    from launch.sweep.slurm import MakeJob
    from launch.sweep.sweep import Sweep

app = typer.Typer()


@app.command(cls=command_class(following={"--folds": "all"}))
@option_groups
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
    folds: Annotated[
        str | None,
        typer.Option(
            help="a run for each fold of the data, or for some, such as 1,3 or their names", metavar="[F1,F2]"
        ),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="runs at once, which share cores and GPUs; default 1, on Slurm all")
    ] = None,
    procs: Annotated[int | None, typer.Option(min=1, help="processes of each run; on Slurm: --procs-per-node")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the sweep; default runs/<config>-sweep", metavar="DIR")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="submit the runs as one array, with the options of egmf launch slurm")
    ] = False,
    asked: SlurmOptions = NOTHING_ASKED,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Train a config with every seed, every combination of values, and every fold. The same command continues it.

    Finished runs are not run again. A run that fails does not end the others. A stop signal stops all of them with
    checkpoints: exit code 85.
    """
    from launch.sweep.folds import chosen_folds
    from launch.sweep.grid import expand, parse_seeds
    from launch.sweep.pool import Budget, visible_gpus
    from launch.sweep.sweep import Sweep

    chosen = parse_seeds(seeds, overrides or [])
    variants = expand(config, overrides or [], values or [])
    tested = chosen_folds(folds, variants)
    plan = Sweep(out or Path("runs") / f"{config.stem}-sweep", variants, chosen, tested)
    if slurm:
        if procs is not None or as_json:
            raise ValueError("--slurm takes --procs-per-node or --gpus-per-node, not --procs, and prints no JSON")
        make_job = _job_maker(plan, asked, parallel, debug)
        return _show_script(plan, make_job) if dry_run else _submit(plan, make_job)
    if asked.given:
        raise ValueError("--nodes, --partition and the like belong to --slurm: add it, or leave them out")
    budget = Budget(parallel or 1, procs or 1, gpus=visible_gpus())
    return _show_runs(plan, budget) if dry_run else _run_here(plan, budget, as_json=as_json, debug=debug)


def _job_maker(plan: Sweep, asked: SlurmOptions, parallel: int | None, debug: bool) -> MakeJob:
    from launch.start.slurm import of_members

    asked.resources()  # refused before anything is looked at

    def make_job(members: list[Member]) -> Job:
        return asked.job(of_members(plan.folder, members, parallel), debug=debug)

    return make_job


def _submit(plan: Sweep, make_job: MakeJob) -> int:
    from launch.sweep.slurm import submit_sweep
    from trainer.logs import set_up_logging

    set_up_logging(None, 0)
    submit_sweep(plan, make_job, say)
    return 0


def _show_script(plan: Sweep, make_job: MakeJob) -> int:
    from launch.sweep.slurm import planned_script

    planned = planned_script(plan, make_job)
    if planned is None:
        say("all runs are done")
        return 0
    script, path = planned
    typer.echo(script)
    say(f"this would be written to {path}, checked and submitted")
    return 0


def _run_here(plan: Sweep, budget: Budget, *, as_json: bool, debug: bool) -> int:
    from launch.sweep.local import run_sweep, table, to_json
    from trainer.logs import set_up_logging

    set_up_logging(None, 0, debug=debug)
    result = run_sweep(plan, budget, say, debug=debug)
    if as_json:
        print_json(to_json(plan, result))
    else:
        wide().print(table(result.runs))
    return result.code


def _show_runs(plan: Sweep, budget: Budget) -> int:
    from launch.sweep.record import open_record
    from launch.sweep.sweep import finished

    open_record(plan)
    children = plan.children()
    done = finished(children)
    wide().print(_planned_runs(plan, done))
    variables = budget.environment(0)
    shares = [f"{key}={variables[key]}" for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if key in variables]
    say(
        f"{len(children) - len(done)} runs to make, {budget.parallel} at once, "
        f"each of {budget.procs} process(es) with {', '.join(shares)}"
    )
    return 0


def _planned_runs(plan: Sweep, done: set[str]) -> Table:
    from rich.table import Table

    variants = plan.plan()["variants"]
    table = Table("run", "", "differs in", title=f"{plan.folder}", title_justify="left")
    for child in plan.children():
        settings = variants[child.variant] | ({} if child.fold is None else {"data.fold": child.fold})
        differs = ", ".join(f"{key}={value}" for key, value in settings.items())
        table.add_row(child.name, "done" if child.name in done else "", differs)
    return table
