"""Submitting a training to Slurm: launch slurm."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.launching import DryRun
from trainer.commands.shared import ConfigFile, Debug, Force, Overrides, check_tasks, default_out, say

if TYPE_CHECKING:
    from launch.start.slurm import Resources

Nodes = Annotated[str, typer.Option(help="how many, or MIN-MAX", metavar="N")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs of each node, one process each")]
ProcsPerNode = Annotated[int | None, typer.Option(min=1, help="processes on each node, without GPUs")]
Partition = Annotated[str | None, typer.Option(help="Slurm's, as all that follow up to cpus-per-task")]
Time = Annotated[str | None, typer.Option(help="time limit: minutes, H:M:S or D-H:M:S")]
Account = Annotated[str | None, typer.Option()]
Qos = Annotated[str | None, typer.Option()]
Constraint = Annotated[str | None, typer.Option()]
Mem = Annotated[str | None, typer.Option(help="memory of each node, such as 200G")]
CpusPerTask = Annotated[int | None, typer.Option(min=1, help="CPU cores of each process")]
SignalSeconds = Annotated[int, typer.Option(min=10, help="stop so long before the time limit")]
Requeue = Annotated[bool, typer.Option(help="go back into the queue when stopped, or when a node is lost")]
Setup = Annotated[list[str] | None, typer.Option(help="a line of shell before the run; repeatable")]
Sbatch = Annotated[list[str] | None, typer.Option(help="another option of sbatch; repeatable")]
Srun = Annotated[list[str] | None, typer.Option(help="another option of srun; repeatable")]


def launch_slurm(
    config: ConfigFile,
    overrides: Overrides = None,
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
    array_seeds: Annotated[str | None, typer.Option(help="one run for each of these, such as 1,2,3")] = None,
    signal_seconds: SignalSeconds = 120,
    requeue: Requeue = True,
    setup: Setup = None,
    sbatch: Sbatch = None,
    srun: Srun = None,
    out: Annotated[Path | None, typer.Option(help="run folder; with seeds, RUN-s<seed>", metavar="RUN")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Submit a training to Slurm. It stops before its time is over, goes back into the queue, and continues."""
    from launch.start.slurm import Job, check, follow, one_run, over_seeds, render, submit
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    check_tasks(loaded.tasks)
    seeds = parse_seeds(array_seeds, overrides or [])
    if seeds:
        layout = over_seeds(loaded, out or Path("runs") / config.stem, seeds)
    else:
        layout = one_run(loaded, out or default_out(config, loaded.train.seed))
    job = Job(
        layout,
        resources(nodes, procs_per_node, gpus_per_node, partition, time, account, qos, constraint, mem, cpus_per_task),
        signal_seconds=signal_seconds,
        requeue=requeue,
        setup=tuple(setup or ()),
        sbatch_options=tuple(sbatch or ()),
        srun_options=tuple(srun or ()),
        flags=tuple(flag for flag, on in (("--force", force), ("--debug", debug)) if on),
    )
    check(job)
    if dry_run:
        typer.echo(render(job))
        say(f"this would be written to {job.script}, checked and submitted:")
        say(f"sbatch --test-only {shlex.quote(str(job.script))}\nsbatch {shlex.quote(str(job.script))}")
        return 0
    number = submit(job)
    say(f"submitted as job {number}: {', '.join(str(member.out) for member in job.layout.members)}")
    for what, command in follow(job, number):
        say(f"{what:8} {command}")
    return 0


def resources(nodes: str, procs_per_node: int | None, gpus_per_node: int | None, *rest: Any) -> Resources:
    """What is asked of Slurm, with the number of processes that the options say.

    Raises:
        ValueError: they do not say it.
    """
    from launch.start.slurm import Resources

    procs = procs_per_node or gpus_per_node
    if procs is None:
        raise ValueError("say how many processes a node runs: --gpus-per-node G, or on CPUs --procs-per-node P")
    return Resources(nodes, procs, gpus_per_node, *rest)


def parse_seeds(text: str | None, overrides: list[str]) -> tuple[int, ...]:
    """The seeds of ``--array-seeds``."""
    if text is None:
        return ()
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--array-seeds {text}: must be whole numbers with commas between them, such as 1,2,3")
    if any(override.startswith("train.seed=") for override in overrides):
        raise ValueError("train.seed and --array-seeds name the seed twice: leave train.seed out")
    return tuple(int(part) for part in text.split(","))
