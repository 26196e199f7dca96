"""A sweep as one Slurm array: an element for every run that is not done, which stops, goes back into the queue and continues.

Each element is the job of one run; see :mod:`launch.start.slurm` for why that is a script and not submitit's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from launch.start.slurm import Job, Member, check, follow, queued, rehearse, render, submit
from launch.sweep.local import Say, begin_parent
from launch.sweep.record import SweepRecord, open_record, write_record
from launch.sweep.sweep import Sweep, finished
from trainer.run.folder import hold

MakeJob = Callable[[list[Member]], Job]


def submit_sweep(sweep: Sweep, make_job: MakeJob, say: Say) -> None:
    """Submit the runs that are not done. The index in the array is the run's place in the sweep, from 1.

    Raises:
        ValueError: the folder holds another sweep; it is in the queue already; Slurm refuses the job.
    """
    with hold(sweep.folder):
        record = open_record(sweep)
        left = _left(sweep, None)
        submitted = record.get("slurm")
        if submitted and queued(submitted):
            raise ValueError(f"the sweep is in the queue as job {submitted}: squeue --job {submitted}")
        if left:
            job = make_job(left)
            check(job)
            rehearse(job)
        record.update(cast(SweepRecord, sweep.plan()))
        write_record(sweep, record)
        parent = begin_parent(sweep, record)
        if not left:
            parent.end("done")
            say(f"all {len(sweep.children())} runs are done")
            return
        job = make_job(_left(sweep, parent.run_id))
        record["slurm"] = job_id = submit(job)
        write_record(sweep, record)
    say(f"submitted as job {job_id}: {len(left)} of {len(sweep.children())} runs, in {sweep.folder}")
    for what, command in follow(job, job_id):
        if what != "results":
            say(f"{what:8} {command}")
    say("results  the same command, when they are done; egmf runs " + str(sweep.folder))


def planned_script(sweep: Sweep, make_job: MakeJob) -> tuple[str, Path] | None:
    """The script that would be submitted, and its place; None where all is done.

    Raises:
        ValueError: as :func:`submit_sweep`.
    """
    open_record(sweep)
    left = _left(sweep, None)
    if not left:
        return None
    job = make_job(left)
    check(job)
    return render(job), job.script


def _left(sweep: Sweep, parent: str | None) -> list[Member]:
    children = sweep.children(parent)
    done = finished(children)
    return [Member(i, child.config, child.out) for i, child in enumerate(children, 1) if child.name not in done]
