"""Submitting a training to Slurm: launch slurm; and the options that it shares with sweep --slurm."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import (
    ConfigFile,
    Debug,
    DryRun,
    Force,
    Overrides,
    default_out,
    option_groups,
    read_config,
)
from trainer.commands.output import say

if TYPE_CHECKING:
    from launch.start.slurm import Job, Layout, Resources


@dataclass(frozen=True)
class SlurmOptions:
    """Resources requested from Slurm, and the job script's settings; each field is an option."""

    nodes: Annotated[str, typer.Option(help="number of nodes, or MIN-MAX", metavar="N")] = "1"
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node, one process each")] = None
    procs_per_node: Annotated[int | None, typer.Option(min=1, help="processes on each node, without GPUs")] = None
    partition: Annotated[str | None, typer.Option(help="Slurm's, as all that follow up to cpus-per-task")] = None
    time: Annotated[str | None, typer.Option(help="time limit: minutes, H:M:S or D-H:M:S")] = None
    account: Annotated[str | None, typer.Option()] = None
    qos: Annotated[str | None, typer.Option()] = None
    constraint: Annotated[str | None, typer.Option()] = None
    mem: Annotated[str | None, typer.Option(help="memory of each node, such as 200G")] = None
    cpus_per_task: Annotated[
        int | None,
        typer.Option(min=0, help="CPU cores of each process; default: what the config needs; 0: the cluster's default"),
    ] = None
    signal_seconds: Annotated[
        int, typer.Option(min=10, help="seconds before the time limit at which the run stops")
    ] = 120
    requeue: Annotated[bool, typer.Option(help="requeue when stopped, or when a node is lost")] = True
    setup: Annotated[list[str] | None, typer.Option(help="a line of shell before the run; repeatable")] = None
    sbatch: Annotated[list[str] | None, typer.Option(help="another option of sbatch; repeatable")] = None
    srun: Annotated[list[str] | None, typer.Option(help="another option of srun; repeatable")] = None

    @property
    def given(self) -> bool:
        """Whether any of these options was used."""
        return self != NOTHING_ASKED

    def resources(self) -> Resources:
        """The resources that the job requests.

        Raises:
            ValueError: the options do not say how many processes a node runs.
        """
        from launch.start.slurm import Resources

        procs = self.procs_per_node or self.gpus_per_node
        if procs is None:
            raise ValueError("say how many processes a node runs: --gpus-per-node G, or on CPUs --procs-per-node P")
        return Resources(
            nodes=self.nodes,
            procs_per_node=procs,
            gpus_per_node=self.gpus_per_node,
            partition=self.partition,
            time=self.time,
            account=self.account,
            qos=self.qos,
            constraint=self.constraint,
            mem=self.mem,
            cpus_per_task=self.cpus_per_task,
        )

    def job(self, layout: Layout, **flags: bool) -> Job:
        """The job of one run or an array; `flags` are switches of ``egmf train``.

        Raises:
            ValueError: see :meth:`resources`.
        """
        from launch.start.slurm import Job

        return Job(
            layout,
            self.resources(),
            signal_seconds=self.signal_seconds,
            requeue=self.requeue,
            setup=tuple(self.setup or ()),
            sbatch_options=tuple(self.sbatch or ()),
            srun_options=tuple(self.srun or ()),
            flags=tuple(f"--{name}" for name, on in flags.items() if on),
        )


NOTHING_ASKED = SlurmOptions()


@option_groups
def launch_slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    asked: SlurmOptions = NOTHING_ASKED,
    array_seeds: Annotated[str | None, typer.Option(help="one run for each of these, such as 1,2,3")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; with seeds, RUN-s<seed>", metavar="RUN")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Submit a training to Slurm. Before its time limit it writes a checkpoint, is requeued and continues."""
    from launch.start.slurm import check, one_run, over_seeds
    from launch.sweep.grid import parse_seeds

    loaded = read_config(config, overrides)
    if array_seeds is None:
        layout = one_run(loaded, out or default_out(config, loaded.train.seed, loaded.data.fold))
    else:
        seeds = parse_seeds(array_seeds, overrides or [], "--array-seeds", allow_repeats=True)
        layout = over_seeds(loaded, out or Path("runs") / config.stem, seeds)
    job = asked.job(layout, force=force, debug=debug)
    check(job)
    return _show(job) if dry_run else _submit(job)


def _show(job: Job) -> int:
    from launch.start.slurm import render

    typer.echo(render(job))
    say(f"this would be written to {job.script}, checked and submitted:")
    say(f"sbatch --test-only {shlex.quote(str(job.script))}\nsbatch {shlex.quote(str(job.script))}")
    return 0


def _submit(job: Job) -> int:
    from launch.start.slurm import follow, submit

    job_id = submit(job)
    say(f"submitted as job {job_id}: {', '.join(str(member.out) for member in job.layout.members)}")
    for what, command in follow(job, job_id):
        say(f"{what:8} {command}")
    return 0
