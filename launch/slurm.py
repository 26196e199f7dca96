"""A run as a Slurm job: an sbatch script that can be read and edited, checked by Slurm, and submitted.

The script starts one `srun` task per process. It is written into the run folder beside the config as it was when the job
was submitted, so that a job which waits, or is requeued, trains what was asked for although the file has changed since.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.config import RunConfig, dump_config
from trainer.run.files import write_text

FOLDER = "slurm"  # inside a run folder: script, config and logs of its jobs
EARLY = 60  # seconds that Slurm may send the signal before it was asked to (man sbatch, --signal)


class SlurmError(ValueError):
    """Slurm is not here, or refuses the job; the message has its reason."""


@dataclass(frozen=True)
class Resources:
    """What is asked of Slurm. None leaves the choice to the cluster."""

    nodes: str  # N or MIN-MAX
    procs_per_node: int
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None

    def directives(self) -> list[str]:
        """The lines for ``#SBATCH``."""
        asked = {
            "nodes": self.nodes,
            # one is Slurm's default, and written down it makes 22.05 take MIN nodes of MIN-MAX although more are idle
            "ntasks-per-node": self.procs_per_node if self.procs_per_node > 1 else None,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
        }
        return [f"--{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None]


@dataclass(frozen=True)
class Job:
    """One run, or with `seeds` an array of runs that differ in their seed, in folders ``base-s<seed>``."""

    config: RunConfig
    base: Path
    resources: Resources
    seeds: tuple[int, ...] = ()
    signal_seconds: int = 120
    requeue: bool = True
    setup: tuple[str, ...] = ()
    sbatch_options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # of `egmf train`

    @property
    def runs(self) -> dict[int, Path]:
        """Seed -> run folder."""
        base = self.base.absolute()
        if not self.seeds:
            return {self.config.train.seed: base}
        return {seed: base.with_name(f"{base.name}-s{seed}") for seed in self.seeds}

    @property
    def script(self) -> Path:
        """Where the script is kept; of an array, in the first run's folder."""
        return next(iter(self.runs.values())) / FOLDER / "job.sbatch"

    @property
    def signal(self) -> str:
        """The signal that is passed on to the processes: one that the run stops on, by choice none that others send too."""
        chosen = self.config.train.stop_signals
        return next((name for name in ("SIGUSR1", "SIGUSR2") if name in chosen), chosen[0]).removeprefix("SIG")


def check(job: Job) -> None:
    """Refuse what would make a job that cannot work, before Slurm is asked.

    Raises:
        ValueError: all faults at once.
    """
    faults = []
    asked = job.resources
    low, _, high = asked.nodes.partition("-")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", asked.nodes) or int(high or low) < int(low):
        faults.append(f"--nodes {asked.nodes}: must be a number, or MIN-MAX such as 2-4")
    if asked.gpus_per_node is not None and asked.procs_per_node != asked.gpus_per_node:
        faults.append(
            f"--procs-per-node {asked.procs_per_node}: with GPUs there is one process for each, so {asked.gpus_per_node}"
        )
    if len(set(job.seeds)) < len(job.seeds):
        faults.append(f"--array-seeds {','.join(map(str, job.seeds))}: names a seed twice")
    seconds = None if asked.time is None else limit_seconds(asked.time)
    if job.requeue and seconds is not None and seconds <= job.signal_seconds + EARLY:
        faults.append(
            f"--time {asked.time}: too short for --signal-seconds {job.signal_seconds}; Slurm may send the signal {EARLY} s "
            "before that, so the job would be stopped as soon as it starts, again and again"
        )
    lines = {
        "--setup": job.setup,
        "--out": [str(job.base)],
        "--sbatch": job.sbatch_options,
        "--srun": job.srun_options,
    }
    faults += [f"{name}: has a line break in it" for name, values in lines.items() if any("\n" in v for v in values)]
    if faults:
        raise ValueError("\n".join(faults))


def limit_seconds(time: str) -> float:
    """A time limit as Slurm writes it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; infinite for "UNLIMITED".

    Raises:
        ValueError: it is none.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    if not re.fullmatch(r"(\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2})", time):
        raise ValueError(f"--time {time}: must be minutes, or H:M:S, or D-H:M:S")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def render(job: Job) -> str:
    """The sbatch script."""
    base = job.base.absolute()
    pattern = str(base).replace("%", "%%")  # Slurm replaces %a, %j and others
    log = f"{pattern}-s%a/{FOLDER}/%A_%a.log" if job.seeds else f"{pattern}/{FOLDER}/%j.log"
    directives = [
        f"--job-name={shlex.quote('egmf-' + base.name)}",
        *job.resources.directives(),
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(log)}",
        "--open-mode=append",
        f"--signal=B:{job.signal}@{job.signal_seconds}",
        "--requeue" if job.requeue else "--no-requeue",
        *([f"--array={','.join(map(str, job.seeds))}"] if job.seeds else []),
        *job.sbatch_options,
    ]
    environment = Environment(
        loader=PackageLoader("launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template("train.sbatch.j2").render(
        title=f"{', '.join(job.config.tasks)}: {base.name}",
        script=job.script,
        directives=directives,
        array=bool(job.seeds),
        base=base,
        procs_per_node=job.resources.procs_per_node,
        python=sys.executable,
        flags=job.flags,
        signal=job.signal,
        requeue=job.requeue,
        patience=max(job.signal_seconds - 15, job.signal_seconds // 2),
        setup=job.setup,
        srun_options=job.srun_options,
    )


def submit(job: Job) -> str:
    """Have Slurm check the script, write it and the config into the run folder(s), submit it; the job's id.

    Nothing is written when Slurm refuses the job.

    Raises:
        SlurmError: Slurm is not here, or refuses the job.
        ValueError: the run folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "there is no sbatch on PATH: run this on a login node of the cluster, or look at it with --dry-run"
        )
    script = render(job)
    _sbatch(["--test-only"], script)
    try:
        for seed, run in job.runs.items():
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            config = job.config.model_copy(deep=True)
            config.train.seed = seed
            write_text(run / FOLDER / "config.yaml", dump_config(config))
        write_text(job.script, script)
    except OSError as error:
        raise ValueError(f"the run folder cannot be written: {error}; choose another with --out") from error
    return _sbatch(["--parsable", str(job.script)], None).partition(";")[0].strip()


def _sbatch(arguments: Sequence[str], script: str | None) -> str:
    """What sbatch says on stdout."""
    done = subprocess.run(["sbatch", *arguments], input=script, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
    reason = "; ".join(dict.fromkeys(said)) or f"sbatch ended with {done.returncode}"
    raise SlurmError(f"Slurm refuses the job: {reason}{_what_there_is(reason)}")


def _what_there_is(reason: str) -> str:
    """What the cluster has of what was refused, as far as sinfo tells."""
    hints = (
        (r"partition", "%P", "partitions here"),
        (r"node (count|configuration)|gres|memory|cpu", "%P %D nodes of %c CPUs, %m MiB, %G", "here is"),
        (r"time limit", "%P %l", "partitions and their time limits"),
    )
    for pattern, columns, words in hints:
        if re.search(pattern, reason, re.IGNORECASE):
            done = subprocess.run(["sinfo", "--noheader", "-o", columns], capture_output=True, text=True, check=False)
            there = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
            if there:
                return f"\n{words}: {'; '.join(there)}"
    return ""


def follow(job: Job, job_id: str) -> list[tuple[str, str]]:
    """What can be done with a submitted job: (words, command)."""
    logs = [
        str(run / FOLDER / (f"{job_id}_{seed}.log" if job.seeds else f"{job_id}.log")) for seed, run in job.runs.items()
    ]
    return [
        ("script", str(job.script)),
        ("follow", shlex.join(["tail", "-F", *logs])),
        ("state", f"squeue --job {job_id}"),
        ("results", "; ".join(shlex.join(["egmf", "show", str(run)]) for run in job.runs.values())),
        ("cancel", f"scancel {job_id}"),
    ]
