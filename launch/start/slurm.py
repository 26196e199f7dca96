"""A run as a Slurm job: an sbatch script that can be read and edited, checked by Slurm, and submitted.

The script starts one `srun` task per process. It is written into the run folder beside the config as it was when the job
was submitted, so that a job which waits, or is requeued, trains what was asked for although the file has changed since.

Not submitit, because it submits pickled Python functions: nothing that a user could read, edit and submit by hand.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.config import RunConfig, dump_config
from trainer.files import write_text

FOLDER = "slurm"  # inside a run folder: script, config and logs of its jobs
EARLY = 60  # seconds that Slurm may send the signal before it was asked to (man sbatch, --signal)


ASKS_FOR_GPUS = re.compile(r"--(gpus\b|gpus-per-|gres=.*\bgpu|tres-per-task=.*\bgpu)|-G")  # of sbatch's options
ASKS_FOR_CORES = re.compile(r"--cpus-per-(task|gpu)\b|-c")
NCCL_CORES = 1  # its proxy, which moves the data of collectives
OWN_CORES = 1  # threads of the run: the watch, the journal and its outbox, the tokenizer's
OFFLOAD_CORES = 4  # the optimizer's steps in host memory


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
    cpus_per_task: int | None = None  # 0: the cluster's default too

    def directives(self) -> list[str]:
        """The lines for ``#SBATCH``."""
        asked = {
            "nodes": self.nodes,
            # one is Slurm's default, and written down it makes 22.05 take MIN nodes of MIN-MAX although more are idle
            "ntasks-per-node": self.procs_per_node if self.procs_per_node > 1 else None,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task or None,
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
        }
        return [f"--{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None]


@dataclass(frozen=True)
class Member:
    """A run of a job, and its index in the array where the job is one."""

    index: int
    config: RunConfig
    out: Path


@dataclass(frozen=True)
class Layout:
    """What a job runs, and where its files are. `log` is Slurm's pattern: %a is the index, %A or %j the job's id."""

    name: str
    members: tuple[Member, ...]
    array: bool
    folder: Path  # its folder `slurm` holds the script
    log: str
    limit: int | None = None  # runs of the array at once

    @property
    def indices(self) -> list[int]:
        return [member.index for member in self.members]

    def log_of(self, member: Member, job_id: str) -> str:
        """Where the job with this id writes for `member`."""
        stand_for = {"a": str(member.index), "A": job_id, "j": job_id, "%": "%"}
        return re.sub("%(.)", lambda found: stand_for[found[1]], self.log)


def one_run(config: RunConfig, out: Path) -> Layout:
    """A job of one run."""
    out = out.absolute()
    return Layout(out.name, (Member(config.train.seed, config, out),), False, out, f"{_escaped(out)}/{FOLDER}/%j.log")


def over_seeds(config: RunConfig, base: Path, seeds: Sequence[int]) -> Layout:
    """An array of runs that differ in their seed, which is also the index, in folders ``base-s<seed>``."""
    base, members = base.absolute(), []
    for seed in seeds:
        own = config.model_copy(deep=True)
        own.train.seed = seed
        members.append(Member(seed, own, base.with_name(f"{base.name}-s{seed}")))
    return Layout(base.name, tuple(members), True, members[0].out, f"{_escaped(base)}-s%a/{FOLDER}/%A_%a.log")


def of_members(folder: Path, members: Sequence[Member], limit: int | None = None) -> Layout:
    """An array of any runs, its script and logs in `folder`."""
    folder = folder.absolute()
    absolute = tuple(Member(member.index, member.config, member.out.absolute()) for member in members)
    return Layout(folder.name, absolute, True, folder, f"{_escaped(folder)}/{FOLDER}/%A_%a.log", limit)


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")  # Slurm replaces %a, %j and others


@dataclass(frozen=True)
class Job:
    """What is submitted: one run, or an array of runs."""

    layout: Layout
    resources: Resources
    signal_seconds: int = 120
    requeue: bool = True
    setup: tuple[str, ...] = ()
    sbatch_options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # of `egmf train`

    @property
    def config(self) -> RunConfig:
        """Of the first run; what is read of it, all have in common."""
        return self.layout.members[0].config

    @property
    def asks_for_gpus(self) -> bool:
        """Whether the processes get GPUs, by an option of ours or of sbatch's."""
        return self.resources.gpus_per_node is not None or any(map(ASKS_FOR_GPUS.match, self.sbatch_options))

    @property
    def script(self) -> Path:
        return self.layout.folder / FOLDER / "job.sbatch"

    @property
    def signal(self) -> str:
        """The signal that is passed on to the processes: one that the run stops on, by choice none that others send too."""
        chosen = self.config.train.stop_signals
        return next((name for name in ("SIGUSR1", "SIGUSR2") if name in chosen), chosen[0]).removeprefix("SIG")


def needed_cores(config: RunConfig, gpus: bool) -> int:
    """The CPU cores of a process: itself, its data workers, and beside a GPU NCCL's proxy, the run's threads, and an offloaded optimizer.

    Slurm gives one core per task where none are asked for, on which all of these would take turns.
    """
    beside = (NCCL_CORES + OWN_CORES + (OFFLOAD_CORES if config.train.offload == "cpu" else 0)) if gpus else 0
    return 1 + config.data.workers_of_rank(gpus) + beside


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
    indices = job.layout.indices
    if len(set(indices)) < len(indices):
        faults.append(f"--array-seeds {','.join(map(str, indices))}: names a seed twice")
    seconds = None if asked.time is None else limit_seconds(asked.time)
    if job.requeue and seconds is not None and seconds <= job.signal_seconds + EARLY:
        faults.append(
            f"--time {asked.time}: too short for --signal-seconds {job.signal_seconds}; Slurm may send the signal {EARLY} s "
            "before that, so the job would be stopped as soon as it starts, again and again"
        )
    lines: dict[str, Sequence[str]] = {
        "--setup": job.setup,
        "--out": [str(member.out) for member in job.layout.members],
        "--sbatch": job.sbatch_options,
        "--srun": job.srun_options,
        "task": job.config.tasks,
        **{f"--{name}": [value] for name, value in vars(asked).items() if isinstance(value, str)},
    }
    faults += [
        f"{name}: has a line break or another control character in it, which would begin a line of its own in the job's script"
        for name, values in lines.items()
        if any(unicodedata.category(sign) == "Cc" and sign != "\t" for value in values for sign in value)
    ]
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
    layout = job.layout
    limit = "" if layout.limit is None else f"%{layout.limit}"
    directives = [
        f"--job-name={shlex.quote('egmf-' + layout.name)}",
        *_resources(job).directives(),
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(layout.log)}",
        "--open-mode=append",
        f"--signal=B:{job.signal}@{job.signal_seconds}",
        "--requeue" if job.requeue else "--no-requeue",
        *([f"--array={','.join(map(str, layout.indices))}{limit}"] if layout.array else []),
        *map(_directive, job.sbatch_options),
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
        title=f"{', '.join(job.config.tasks)}: {layout.name}",
        script=job.script,
        directives=directives,
        array=layout.array,
        members=layout.members,
        procs_per_node=job.resources.procs_per_node,
        python=sys.executable,
        flags=job.flags,
        signal=job.signal,
        requeue=job.requeue,
        patience=max(job.signal_seconds - 15, job.signal_seconds // 2),
        setup=job.setup,
        srun_options=job.srun_options,
    )


def _resources(job: Job) -> Resources:
    """What is asked of Slurm, with as many cores as the run needs where nothing was said of them."""
    asked = job.resources
    said = asked.cpus_per_task is not None or any(map(ASKS_FOR_CORES.match, job.sbatch_options))
    cores = max(needed_cores(member.config, job.asks_for_gpus) for member in job.layout.members)
    return asked if said or cores == 1 else replace(asked, cpus_per_task=cores)


def _directive(option: str) -> str:
    """An option of sbatch as it stands behind ``#SBATCH``, where words are split as in a shell: ``--comment=hello world`` in quotes."""
    name, equals, value = option.partition("=")
    if not equals or not name.startswith("--") or value[:1] in ("'", '"'):
        return option
    return f"{name}={shlex.quote(value)}"


def submit(job: Job) -> str:
    """Have Slurm check the script, write it and the config into the run folder(s), submit it; the job's id.

    Nothing is written when Slurm refuses the job.

    Raises:
        SlurmError: Slurm is not here, or refuses the job.
        ValueError: the run folder cannot be written.
    """
    script = render(job)
    _sbatch(["--test-only"], script)
    try:
        for member in job.layout.members:
            (member.out / FOLDER).mkdir(parents=True, exist_ok=True)
            write_text(member.out / FOLDER / "config.yaml", dump_config(member.config))
        job.script.parent.mkdir(parents=True, exist_ok=True)
        write_text(job.script, script)
    except OSError as error:
        raise ValueError(f"the run folder cannot be written: {error}; choose another with --out") from error
    return _sbatch(["--parsable", str(job.script)], None).partition(";")[0].strip()


def rehearse(job: Job) -> None:
    """Have Slurm say whether it would take the job.

    Raises:
        SlurmError: Slurm is not here, or refuses the job.
    """
    _sbatch(["--test-only"], render(job))


def queued(job_id: str) -> bool:
    """Whether Slurm still has the job, or a part of the array, waiting or running."""
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"], capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and bool(done.stdout.strip())


def _sbatch(arguments: Sequence[str], script: str | None) -> str:
    """What sbatch says on stdout."""
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "there is no sbatch on PATH: run this on a login node of the cluster, or look at it with --dry-run"
        )
    done = subprocess.run(["sbatch", *arguments], input=script, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    messages = [
        line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()
    ]
    reason = "; ".join(dict.fromkeys(messages)) or f"sbatch ended with {done.returncode}"
    raise SlurmError(f"Slurm refuses the job: {reason}{_what_there_is(reason)}")


def _what_there_is(reason: str) -> str:
    """What the cluster has of what was refused, as far as sinfo shows."""
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
    logs = [job.layout.log_of(member, job_id) for member in job.layout.members]
    shows = [shlex.join(["egmf", "show", str(member.out)]) for member in job.layout.members]
    return [
        ("script", str(job.script)),
        ("follow", shlex.join(["tail", "-F", *logs])),
        ("state", f"squeue --job {job_id}"),
        ("results", "; ".join(shows)),
        ("cancel", f"scancel {job_id}"),
    ]
