"""One config over values and seeds: sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trainer.commands.launching import DryRun
from trainer.commands.shared import ConfigFile, Debug, Json, Overrides, print_json, say, wide
from trainer.commands.slurm import (
    Account,
    Constraint,
    CpusPerTask,
    GpusPerNode,
    Mem,
    Nodes,
    Partition,
    ProcsPerNode,
    Qos,
    Requeue,
    Sbatch,
    Setup,
    SignalSeconds,
    Srun,
    Time,
    resources,
)

if TYPE_CHECKING:
    from launch.start.slurm import Job, Member
    from launch.sweep.sweep import Sweep

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
    parallel: Annotated[
        int | None, typer.Option(min=1, help="runs at once, which share cores and GPUs; default 1, on Slurm all")
    ] = None,
    procs: Annotated[int | None, typer.Option(min=1, help="processes of each run; on Slurm see below")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the sweep; default runs/<config>-sweep", metavar="DIR")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit the runs as one array, with what follows")] = False,
    nodes: Nodes = "1",
    gpus_per_node: GpusPerNode = None,
    procs_per_node: ProcsPerNode = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    mem: Mem = None,
    cpus_per_task: CpusPerTask = None,
    signal_seconds: SignalSeconds = 120,
    requeue: Requeue = True,
    setup: Setup = None,
    sbatch: Sbatch = None,
    srun: Srun = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Train a config with every seed and every combination of values. The same command continues it.

    Finished runs are not run again. A run that fails does not end the others. A stop signal stops all of them with
    checkpoints: exit code 85.
    """
    from launch.sweep.sweep import Sweep, expand, parse_seeds

    chosen = parse_seeds(seeds, overrides or [])
    plan = Sweep(out or Path("runs") / f"{config.stem}-sweep", expand(config, overrides or [], values or []), chosen)
    asked = (partition, time, account, qos, constraint, mem, cpus_per_task)
    others = (gpus_per_node, procs_per_node, setup, sbatch, srun)
    if not slurm:
        if any(value is not None for value in (*asked, *others)) or nodes != "1" or not requeue:
            raise ValueError("--nodes, --partition and the like belong to --slurm: add it, or leave them out")
        return start(plan, parallel or 1, procs or 1, dry_run=dry_run, as_json=as_json, debug=debug)
    if procs is not None or as_json:
        raise ValueError("--slurm takes --procs-per-node or --gpus-per-node, not --procs, and prints no JSON")
    from launch.start.slurm import Job, of_members

    wanted = resources(nodes, procs_per_node, gpus_per_node, *asked)

    def make_job(members: list[Member]) -> Job:
        return Job(
            of_members(plan.folder, members, parallel),
            wanted,
            signal_seconds=signal_seconds,
            requeue=requeue,
            setup=tuple(setup or ()),
            sbatch_options=tuple(sbatch or ()),
            srun_options=tuple(srun or ()),
            flags=("--debug",) if debug else (),
        )

    return _on_slurm(plan, make_job, dry_run=dry_run)


def _on_slurm(plan: Sweep, make_job: Callable[[list[Member]], Job], *, dry_run: bool) -> int:
    from launch.sweep.slurm import planned_script, submit_sweep
    from trainer.logs import set_up_logging

    if not dry_run:
        set_up_logging(None, 0)
        submit_sweep(plan, make_job, say)
        return 0
    planned = planned_script(plan, make_job)
    if planned is None:
        say("all runs are done")
        return 0
    script, place = planned
    typer.echo(script)
    say(f"this would be written to {place}, checked and submitted")
    return 0


def start(plan: Sweep, parallel: int, procs: int, *, dry_run: bool, as_json: bool, debug: bool) -> int:
    """Make the runs on this machine, or tell what would be made."""
    from launch.sweep.local import run_sweep, table, to_json
    from launch.sweep.pool import Budget, visible_gpus
    from launch.sweep.sweep import finished, open_record
    from trainer.logs import set_up_logging

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
