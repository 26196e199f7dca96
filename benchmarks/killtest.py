"""Is a run that is killed again and again the same run?

    python -m benchmarks.killtest --kills 100 --work DIR [--cases zero1,zero2-nf4] [--out benchmarks/results/FILE.json]

A case is a two-process run (module dropout, LoRA, gradient accumulation with an uneven last micro-batch) at one ZeRO
stage, with and without NF4. Each case is run once undisturbed. Then a chain: the run is started, SIGKILLed at a random
moment, started again, and so on, until its share of the kills is spent; then it may end. Everything that the two say must
be equal: the bytes of the final weights, every prediction and metric, and the loss of every step, each time it was trained.

A kill strikes inside a step, inside a checkpoint's writing, or inside an evaluation, in turn, and hits both ranks, one of
them, or the launcher. With the same --work an interrupted test goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import pandas as pd

from benchmarks.machine import describe, today

ROOT = Path(__file__).resolve().parent.parent
CASES = {f"zero{z}{suffix}": (z, suffix) for z in (1, 2, 3) for suffix in ("", "-nf4")}
STEPS, EVAL_EVERY, SAVE_EVERY = 60, 6, 3
MOMENTS = ("step", "save", "evaluation")
VICTIMS = ("all", "rank 0", "rank 1", "launcher")
POLL = 0.002


class Kill(TypedDict):
    """What was killed, when, and whether a checkpoint was being written."""

    moment: str
    victim: str
    writing: bool
    step: int


class Progress(TypedDict):
    """What a case has been through; `equal` says of each finished chain whether it equals the undisturbed run."""

    kills: list[Kill]
    chains: int
    equal: list[bool]


class Chain:
    """The runs of one case: undisturbed once, then killed and continued."""

    def __init__(self, name: str, work: Path, data: Path, procs: int, steps: int) -> None:
        self.name, self.work, self.procs, self.steps = name, work / name, procs, steps
        stage, suffix = CASES[name]
        self.work.mkdir(parents=True, exist_ok=True)
        self.overrides = [
            f"data.path={data}",
            f"train.zero={stage}",
            f"model.backbone.quantization={'nf4' if suffix else 'none'}",
            "model.backbone.tiny.vocab_size=400",
            "model.adapter.dropout=0.1",
            "model.fusion.dropout=0.1",
            f"train.steps={steps}",
            "train.global_batch=14",
            "train.micro_batch=4",
            f"train.eval_every={min(EVAL_EVERY, steps)}",
            f"train.save_every={min(SAVE_EVERY, steps)}",
            "train.log_every=1",
            "track.system_metrics=false",
        ]

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trainer", "launch", "local", "--procs", str(self.procs)]
        with (out.parent / f"{out.name}.txt").open("ab") as output:
            return subprocess.Popen(
                [*command, str(ROOT / "configs/tiny.yaml"), "--out", str(out), *self.overrides],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    def reference(self) -> Path:
        out = self.work / "whole"
        if not (out / "metrics.json").is_file():
            code = self.start(out).wait()
            assert code == 0, f"{self.name}: the undisturbed run ended with {code}; see {out}.txt"
        return out

    def finish(self, out: Path) -> None:
        code = self.start(out).wait()
        assert code == 0, f"{self.name}: the killed run, continued, ended with {code}; see {out}.txt"

    def kill_once(self, out: Path, moment: str, victim: str, rng: random.Random) -> Kill | None:
        """Start or continue the run and kill it; None when it ended before the moment came, or was ending."""
        launcher = self.start(out)
        log = out / "log.txt"
        begun = log.stat().st_size if log.exists() else 0
        reached = _MOMENTS[moment](launcher, out, begun, rng)
        ranks = _children(launcher.pid) if reached else []
        if len(ranks) < self.procs:
            code = launcher.wait()
            assert code == 0, f"{self.name}: the continued run ended with {code}; see {out}.txt"
            return None
        struck = _strike(launcher, ranks, victim)
        writing = bool(list(out.glob("checkpoints/.writing-*")))
        launcher.wait(timeout=60)
        _assert_ended(ranks)
        return {"moment": moment, "victim": struck, "writing": writing, "step": _step(out)}


def _step_moment(launcher: subprocess.Popen[bytes], out: Path, begun: int, rng: random.Random) -> bool:
    if not _wait_for(launcher, lambda: "INFO trainer.tracking.progress: step" in _logged(out, begun)):
        return False
    return _sleep(launcher, rng.uniform(0.0, 3.0))


def _save_moment(launcher: subprocess.Popen[bytes], out: Path, begun: int, rng: random.Random) -> bool:
    if not _wait_for(launcher, lambda: bool(list(out.glob("checkpoints/.writing-*")))):
        return False
    return _sleep(launcher, rng.uniform(0.0, 0.15))


def _evaluation_moment(launcher: subprocess.Popen[bytes], out: Path, begun: int, rng: random.Random) -> bool:
    ends = [f": step {step}/" for step in range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)]
    if not _wait_for(launcher, lambda: any(end in _logged(out, begun) for end in ends)):
        return False
    return _sleep(launcher, rng.uniform(0.0, 0.3))


_MOMENTS: dict[str, Callable[[subprocess.Popen[bytes], Path, int, random.Random], bool]] = {
    "step": _step_moment,
    "save": _save_moment,
    "evaluation": _evaluation_moment,
}


def _logged(out: Path, begun: int) -> str:
    try:
        with (out / "log.txt").open(encoding="utf-8") as handle:
            handle.seek(begun)
            return handle.read()
    except FileNotFoundError:
        return ""


def _wait_for(launcher: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    while launcher.poll() is None:
        if ready():
            return True
        time.sleep(POLL)
    return False


def _sleep(launcher: subprocess.Popen[bytes], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and launcher.poll() is None:
        time.sleep(POLL)
    return launcher.poll() is None


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _strike(launcher: subprocess.Popen[bytes], ranks: list[int], victim: str) -> str:
    if victim.startswith("rank"):
        place = int(victim.split()[1]) % len(ranks)
        os.kill(ranks[place], signal.SIGKILL)
        return f"rank {place}"
    launcher.send_signal(signal.SIGKILL)
    if victim == "all":
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
    return victim


def _assert_ended(pids: list[int], seconds: float = 30.0) -> None:
    """Nothing of a killed run may be left after 30 s."""
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < until, f"processes {left} outlived their run"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _step(out: Path) -> int:
    saved = sorted(path.name for path in out.glob("checkpoints/step-*"))
    return int(saved[-1].removeprefix("step-")) if saved else 0


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of the journal that has one."""
    found = []
    for line in (out / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "train/loss" in entry.get("metrics", {}):
            found.append((entry["step"], entry["metrics"]["train/loss"]))
    return found


def differences(whole: Path, killed: Path, steps: int) -> list[str]:
    """What differs in the killed run; empty when nothing does."""
    faults = []
    last = f"checkpoints/step-{steps:08d}/model.safetensors"
    if (whole / last).read_bytes() != (killed / last).read_bytes():
        faults.append("the final weights")
    if (whole / "metrics.json").read_bytes() != (killed / "metrics.json").read_bytes():
        faults.append("metrics.json")
    for split in ("valid", "test"):
        one, two = (pd.read_parquet(run / "predictions" / f"{split}.parquet") for run in (whole, killed))
        if not one.equals(two):
            faults.append(f"the predictions on {split}")
    if dict(losses(whole)) != dict(losses(killed)) or len(losses(killed)) != steps:
        faults.append("the losses in the journal")
    if "gave" in (killed / "log.txt").read_text(encoding="utf-8"):
        faults.append("a repeated step, by the journal's own check")
    return faults


def run_case(chain: Chain, kills: int, seed: int) -> Progress:
    """Spend `kills` on a case, over as many chains as it takes; what was done is kept in kills.json."""
    whole, kept = chain.reference(), chain.work / "kills.json"
    done: Progress = json.loads(kept.read_text()) if kept.exists() else {"kills": [], "chains": 0, "equal": []}
    rng = random.Random(f"{seed} {chain.name} {len(done['kills'])}")
    while len(done["kills"]) < kills or len(done["equal"]) < done["chains"]:
        out = chain.work / f"chain{len(done['equal'])}"
        done["chains"] = len(done["equal"]) + 1
        number = len(done["kills"])
        if number < kills:
            struck = chain.kill_once(out, MOMENTS[number % 3], rng.choice(VICTIMS), rng)
            if struck is not None:
                done["kills"].append(struck)
                print(f"{chain.name}: kill {number + 1} of {kills}: {struck}", flush=True)
                kept.write_text(json.dumps(done))
                continue
        chain.finish(out)
        faults = differences(whole, out, chain.steps)
        print(f"{chain.name}: chain {done['chains']} {'equal' if not faults else 'DIFFERS: ' + ', '.join(faults)}")
        done["equal"].append(not faults)
        kept.write_text(json.dumps(done))
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work.resolve() / "data"
    sizes = [f"--size={split}={n}" for split, n in {"train": 96, "valid": 48, "test": 48}.items()]
    prepare = [sys.executable, "-m", "trainer", "prepare", "diagnostic", "--out", str(data), *sizes]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    names = args.cases.split(",")
    began = time.monotonic()
    results = {}
    for place, name in enumerate(names):
        share = args.kills * (place + 1) // len(names) - args.kills * place // len(names)
        results[name] = run_case(Chain(name, args.work.resolve(), data, args.procs, args.steps), share, args.seed)
    kills = [kill for case in results.values() for kill in case["kills"]]
    record = {
        "date": today(),
        "command": f"python -m benchmarks.killtest --kills {args.kills} --seed {args.seed}",
        "machine": describe("torch", "deepspeed"),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "kills": len(kills),
        "moments": {m: sum(kill["moment"] == m for kill in kills) for m in MOMENTS},
        "while_a_checkpoint_was_being_written": sum(kill["writing"] for kill in kills),
        "victims": {v: sum(kill["victim"] == v for kill in kills) for v in VICTIMS},
        "cases": {
            n: {"kills": len(r["kills"]), "chains": r["chains"], "equal": sum(r["equal"])} for n, r in results.items()
        },
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(all(r["equal"]) for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
