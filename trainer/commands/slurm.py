"""Submitting a training to Slurm: launch slurm."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.launching import DryRun
from trainer.commands.shared import ConfigFile, Debug, Force, Overrides, check_tasks, default_out, say


def launch_slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="how many, or MIN-MAX", metavar="N")] = "1",
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node, one process each")] = None,
    procs_per_node: Annotated[int | None, typer.Option(min=1, help="processes on each node, without GPUs")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's, as all that follow up to cpus-per-task")] = None,
    time: Annotated[str | None, typer.Option(help="time limit: minutes, H:M:S or D-H:M:S")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    mem: Annotated[str | None, typer.Option(help="memory of each node, such as 200G")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPU cores of each process")] = None,
    array_seeds: Annotated[str | None, typer.Option(help="one run for each of these, such as 1,2,3")] = None,
    signal_seconds: Annotated[int, typer.Option(min=10, help="stop so long before the time limit")] = 120,
    requeue: Annotated[bool, typer.Option(help="go back into the queue when stopped, or when a node is lost")] = True,
    setup: Annotated[list[str] | None, typer.Option(help="a line of shell before the run; repeatable")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="another option of sbatch; repeatable")] = None,
    srun: Annotated[list[str] | None, typer.Option(help="another option of srun; repeatable")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; with seeds, RUN-s<seed>", metavar="RUN")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Submit a training to Slurm. It stops before its time is over, goes back into the queue, and continues."""
    from launch.slurm import Job, Resources, check, follow, render, submit
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    check_tasks(loaded.tasks)
    seeds = parse_seeds(array_seeds, overrides or [])
    procs = procs_per_node or gpus_per_node
    if procs is None:
        raise ValueError("say how many processes a node runs: --gpus-per-node G, or on CPUs --procs-per-node P")
    job = Job(
        config=loaded,
        base=out or (Path("runs") / config.stem if seeds else default_out(config, loaded.train.seed)),
        resources=Resources(nodes, procs, gpus_per_node, partition, time, account, qos, constraint, mem, cpus_per_task),
        seeds=seeds,
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
    say(f"submitted as job {number}: {', '.join(map(str, job.runs.values()))}")
    for what, command in follow(job, number):
        say(f"{what:8} {command}")
    return 0


def parse_seeds(text: str | None, overrides: list[str]) -> tuple[int, ...]:
    """The seeds of ``--array-seeds``."""
    if text is None:
        return ()
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--array-seeds {text}: must be whole numbers with commas between them, such as 1,2,3")
    if any(override.startswith("train.seed=") for override in overrides):
        raise ValueError("train.seed and --array-seeds name the seed twice: leave train.seed out")
    return tuple(int(part) for part in text.split(","))
