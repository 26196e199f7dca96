"""How long do commands take that do little, and how long until a training takes its first step?

    python -m benchmarks.start [--rounds 5] [--against OTHER]

Every command is a process of its own, with the files in the page cache (a first round is not counted), and computes on one thread. `cpu_s` is user and system time of
the command and all processes that it starts, which other programs disturb less than `wall_s`, from the command to its end. Of the demo it is the time until
``log.txt`` of its run says "step 1", at which the demo is ended, with all its processes; what they have computed until then is read from
``/proc``. The demo's data are generated before, and its run folder is made anew in every round ("first step"), or holds a checkpoint of
step 2 ("continued"). `--against` is the root of another checkout of this package: both are measured in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import psutil

from benchmarks.machine import Machine, describe, today
from trainer.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
SECONDS = 300.0  # that a first step is waited for
POLL = 0.02
FEW_STEPS = ("train.steps=4", "train.eval_every=2", "eval.splits=[valid]", "track.report=false")


class Times(TypedDict):
    """Medians over the rounds, and every round's seconds."""

    cpu_s: float
    wall_s: float
    cpu_rounds: list[float]
    wall_rounds: list[float]


class Result(TypedDict):
    """``benchmarks/results/start.json``; a case -> its times, of `--against` too where it was given."""

    date: str
    command: str
    machine: Machine
    load_average: list[float]  # at the beginning and at the end: other programs' share in the wall clock
    seconds: dict[str, Times]
    against: dict[str, Times] | None


@dataclass(frozen=True)
class Package:
    """A checkout of the package, and a folder in which its commands run; nothing else writes there."""

    root: Path
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "trainer", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        return {**kept, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str) -> tuple[float, float]:
        """Seconds of CPU and wall of a command."""
        began = time.perf_counter()
        with (self.folder / "output").open("w") as output:
            process = subprocess.Popen(
                self.command(*arguments), env=self.environment, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT
            )
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"egmf {' '.join(arguments)}: exit code {process.returncode}\n{self._output()}")
        return used.ru_utime + used.ru_stime, time.perf_counter() - began

    def first_step(self, run: str, *arguments: str) -> tuple[float, float]:
        """Seconds of CPU and wall until the log of the run folder `run` says that one more step was taken; then the command is ended."""
        log = self.folder / run / "log.txt"
        seen = _steps(log)
        began = time.perf_counter()
        with (self.folder / "output").open("w") as output:
            process = subprocess.Popen(
                self.command(*arguments),
                env=self.environment,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while _steps(log) == seen:
                    if process.poll() is not None or time.perf_counter() - began > SECONDS:
                        raise RuntimeError(f"egmf {' '.join(arguments)}: no step was taken\n{self._output()}")
                    time.sleep(POLL)
                wall, cpu = time.perf_counter() - began, _cpu(process.pid)
            finally:
                ranks = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
                psutil.wait_procs(ranks)  # they end with it
        return cpu, wall

    def _output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-3000:]


def _steps(log: Path) -> int:
    """Lines of a run's log that tell of a step taken."""
    return log.read_text(encoding="utf-8").count("trainer.tracking.progress: step ") if log.is_file() else 0


def _cpu(pid: int) -> float:
    """Seconds of user and system time of a process and of all that it has started, ended ones included."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def prepare(package: Package) -> None:
    """The demo's data, a run of few steps of its config, two samples, and a file of predictions to be scored."""
    with (package.folder / "output").open("w") as output:
        code = (
            "from pathlib import Path; from trainer.data.generated.diagnostic import generate; "
            "generate('diagnostic', Path('runs/demo-data'))"
        )
        subprocess.run(
            [sys.executable, "-c", code], env=package.environment, cwd=package.folder, stderr=output, check=True
        )
    package.run(
        "launch", "local", "demo", "data.path=runs/demo-data", *FEW_STEPS, "--procs", "2", "--out", "runs/few"
    )  # fmt: skip
    lines = [{"id": "a", "text": "the guest came in"}, {"id": "b", "text": "他又说了一遍"}]
    (package.folder / "two.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    rows = ["id,label,prediction", *(f"{i},joy,{'joy' if i % 3 else 'anger'}" for i in range(100))]
    (package.folder / "predictions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def round_of(package: Package) -> dict[str, tuple[float, float]]:
    """Every case once."""
    found = {
        "egmf --help": package.run("--help"),
        "egmf config show meld": package.run("config", "show", "meld"),
        "egmf score (100 rows)": package.run("score", "predictions.csv", "--task", "meld", "--json"),
        "egmf predict (two lines)": package.run(
            "predict", "runs/few", "--input", "two.jsonl", "--out", "answers.jsonl"
        ),
    }
    shutil.rmtree(package.folder / "runs/demo", ignore_errors=True)
    (package.folder / "runs/mlflow.db").unlink(missing_ok=True)
    found["egmf demo: first step"] = package.first_step("runs/demo", "demo", "--procs", "2")
    continued = package.folder / "runs/continued"
    shutil.rmtree(continued, ignore_errors=True)
    arguments = (
        "launch",
        "local",
        "demo",
        "data.path=runs/demo-data",
        *FEW_STEPS,
        "--procs",
        "2",
        "--out",
        str(continued),
    )
    shutil.copytree(package.folder / "runs/few", continued)
    shutil.rmtree(continued / "checkpoints/step-00000004")
    (continued / "checkpoints/best").unlink(missing_ok=True)
    found["egmf launch local: first step, continued"] = package.first_step("runs/continued", *arguments)
    return found


def summary(rounds: Sequence[dict[str, tuple[float, float]]]) -> dict[str, Times]:
    out: dict[str, Times] = {}
    for case in rounds[0]:
        cpu, wall = zip(*(found[case] for found in rounds), strict=True)
        out[case] = {
            "cpu_s": round(statistics.median(cpu), 2),
            "wall_s": round(statistics.median(wall), 2),
            "cpu_rounds": [round(value, 2) for value in cpu],
            "wall_rounds": [round(value, 2) for value in wall],
        }
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--out", type=Path, default=RESULTS / "start.json")
    args = parser.parse_args()
    load = [os.getloadavg()[0]]
    roots = [ROOT, *([args.against.resolve()] if args.against else [])]
    with tempfile.TemporaryDirectory() as name:
        packages = [Package(root, Path(name) / str(i)) for i, root in enumerate(roots)]
        for package in packages:
            package.folder.mkdir()
            prepare(package)
        rounds: list[list[dict[str, tuple[float, float]]]] = [[] for _ in packages]
        for number in range(args.rounds + 1):
            for package, found in zip(packages, rounds, strict=True):
                found.append(round_of(package))
                sys.stderr.write(f"round {number} of {package.root.name}: {found[-1]}\n")
    found = [summary(one[1:]) for one in rounds]
    result: Result = {
        "date": today(),
        "command": f"python -m benchmarks.start --rounds {args.rounds}" + (" --against OTHER" if args.against else ""),
        "machine": describe("torch", "deepspeed", "transformers", "peft", "mlflow"),
        "load_average": [round(value, 1) for value in [*load, os.getloadavg()[0]]],
        "seconds": found[0],
        "against": found[1] if args.against else None,
    }
    write_json(args.out, result)
    for case, times in found[0].items():
        before = "" if len(found) == 1 else f"{found[1][case]['cpu_s']:6.2f} {found[1][case]['wall_s']:6.2f} -> "
        sys.stdout.write(f"{case:45} cpu, wall: {before}{times['cpu_s']:6.2f} {times['wall_s']:6.2f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
