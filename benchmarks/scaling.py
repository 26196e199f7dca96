"""What does a step send, and how fast is it, on 1, 2 and 4 processes? Bytes on CPU against each ZeRO stage's theory.

    python -m benchmarks.scaling --work DIR [--procs 1,2,4] [--out benchmarks/results/scaling.json]

Three counts of the bytes that a rank sends in an optimizer step:

- *called*: the sizes of all collectives that the step calls, each times its ring factor (all-reduce 2 (N-1)/N of the tensor,
  all-gather, reduce-scatter, reduce and broadcast (N-1)/N of the whole);
- *sent*: what the loopback device of a network namespace of the run's own counted, divided by N (as root; else missing). It
  holds TCP's headers too, and the algorithms are gloo's;
- *planned*: :func:`launch.plan.memory.wire_bytes`. Beside it the paper's theory: 2 b W (N-1)/N at stages 0 to 2 and 3 b W (N-1)/N
  at stage 3 for W trained weights of b bytes (what is frozen is gathered, never reduced: 2 of the 3).

Samples a second are of processes that share one machine's cores: they say what the machinery costs, not what GPUs would do.
An interrupted benchmark goes on where it was, with the same --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.machine import describe, today
from benchmarks.ranks import ROOT, prepare_steps, run_ranks

WARM, STEPS = 2, 3
FACTORS = {  # of the larger of a collective's tensors, for N ranks: passes over (N-1)/N of it
    "all_reduce": 2,
    "all_reduce_coalesced": 2,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_into_tensor_coalesced": 1,
    "_all_gather_base": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "_reduce_scatter_base": 1,
    "reduce": 1,
    "broadcast": 1,
}
NOTHING_KEPT = [
    f"deepspeed.zero_optimization.stage3_{key}=0"
    for key in ("max_reuse_distance", "prefetch_bucket_size", "max_live_parameters")
]


@dataclass(frozen=True)
class Case:
    """A ZeRO stage, what is trained, in which precision."""

    stage: int
    kind: str
    precision: str
    keeps: bool = True  # ZeRO-3 holds on to gathered weights as DeepSpeed's defaults say

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.kind}-{self.precision}" + ("" if self.keeps else "-nothing-kept")

    def overrides(self, data: Path) -> list[str]:
        tiny = {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "layers": 4,
            "heads": 8,
            "kv_heads": 4,
            "vocab_size": 400,
        }
        return [
            "task=meld",
            f"data.path={data}/{{task}}",
            *(f"model.backbone.tiny.{key}={value}" for key, value in tiny.items()),
            f"model.adapter.kind={self.kind}",
            f"train.zero={self.stage}",
            f"train.precision={self.precision}",
            "train.global_batch=16",
            "train.micro_batch=4",
            f"train.steps={WARM + STEPS}",
            "track.mlflow=false",
            *([] if self.keeps else NOTHING_KEPT),
        ]


CASES = [
    *(Case(z, kind, "fp32") for kind in ("full", "lora") for z in range(4)),
    *(Case(z, "full", "bf16") for z in range(4)),
    *(Case(3, kind, "fp32", keeps=False) for kind in ("full", "lora")),
]


class Calls:
    """Counts the bytes of every collective that goes through torch.distributed; install it before DeepSpeed is imported."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._inside = False

    def install(self) -> None:
        import torch.distributed as dist

        for name in FACTORS:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        import torch.distributed as dist

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            ranks = dist.get_world_size(group)
            largest = max((_bytes(value) for value in [*args, *kwargs.values()]), default=0)
            self.sent[name] += round(FACTORS[name] * largest * (ranks - 1) / ranks)
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call


def _bytes(value: Any) -> int:
    import torch

    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def loopback() -> int:
    """Bytes that this network namespace's loopback device has sent."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def work_of_rank(place: Path, own_network: bool) -> None:
    """Every case in turn, as one rank; rank 0 writes the results."""
    calls = Calls()
    calls.install()
    from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world
    from trainer.files import write_json

    quiet_deepspeed()
    world = start_world()
    written = place / "results.json"
    results = json.loads(written.read_text()) if written.is_file() else {}
    for name, overrides in json.loads((place / "cases.json").read_text()).items():
        if any(world.gather_all(name in results)):  # by an earlier start
            continue
        steps = prepare_steps(overrides, place / name, world, WARM + STEPS)
        for index in range(WARM):
            steps.step(index)
        world.barrier()
        calls.sent.clear()
        lo, began = loopback(), time.perf_counter()
        for index in range(WARM, WARM + STEPS):
            steps.step(index)
        seconds = time.perf_counter() - began
        called = {key: round(value / STEPS) for key, value in calls.sent.items()}
        world.barrier()
        results[name] = {
            "samples_per_second": steps.samples * STEPS / seconds,
            "called": called,
            "sent": round((loopback() - lo) / STEPS / world.size) if own_network else None,
        }
        print(name, results[name], flush=True)
        if world.is_rank_zero:
            write_json(written, results)
    stop_world()


def own_network_possible() -> bool:
    """Whether this user may make a network namespace."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


class Counted(TypedDict):
    """A case as rank 0 counted it: bytes of an optimizer step by collective, and on the wire where that can be seen."""

    samples_per_second: float
    called: dict[str, int]
    sent: int | None


class Theory(TypedDict):
    """The bytes of a step by the plan and by the ZeRO paper."""

    micro_steps: float
    trained_bytes: int
    frozen_bytes: int
    planned: dict[str, int]
    paper: int


def measure(procs: int, data: Path, work: Path, cases: list[Case]) -> dict[str, Counted]:
    """Name of the case -> what rank 0 counted."""
    place = work / f"procs{procs}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "cases.json").write_text(json.dumps({case.name: case.overrides(data) for case in cases}))
    own = own_network_possible()
    command = [sys.executable, "-m", "benchmarks.scaling", "--group", str(place), str(procs), str(int(own))]
    if own:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    results: dict[str, Counted] = json.loads((place / "results.json").read_text())
    return results


def theory(case: Case, procs: int, data: Path) -> Theory:
    """The plan's bytes of a step, and the paper's."""
    from launch.plan.fake_model import build_fake_model, fake_tensors
    from launch.plan.lengths import run_lengths
    from launch.plan.memory import wire_bytes
    from launch.plan.plan import backbone_shape, make_setting
    from launch.plan.weights import count_weights
    from trainer.config import load_config
    from trainer.distributed.deepspeed_config import ZERO_DEFAULTS, dtype_of

    config = load_config(ROOT / "configs/tiny.yaml", case.overrides(data))
    lengths, dtype = run_lengths(config, procs), dtype_of(config)
    with fake_tensors():
        weights = count_weights(
            build_fake_model(config, backbone_shape(config), lengths.widths, dtype),
            ZERO_DEFAULTS["stage3_param_persistence_threshold"],
        )
    setting = make_setting(config, procs, lengths.micro_steps, stage=case.stage)
    planned = wire_bytes(weights, setting)
    ring = (procs - 1) / procs
    trained, frozen = dtype.itemsize * weights.trainable, weights.dense_bytes + weights.packed_bytes
    paper = 2 * trained * ring if case.stage < 3 else (3 * trained + 2 * frozen) * ring
    return {
        "micro_steps": lengths.micro_steps,
        "trained_bytes": trained,
        "frozen_bytes": frozen,
        "planned": planned,
        "paper": round(paper),
    }


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        work_of_rank(Path(sys.argv[2]), sys.argv[3] == "1")
        return
    if sys.argv[1:2] == ["--group"]:
        place, procs, own_network = sys.argv[2:]
        arguments = ["benchmarks.scaling", "--rank", place, own_network]
        run_ranks(arguments, int(procs), Path(place), GLOO_SOCKET_IFNAME="lo")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--procs", default="1,2,4")
    parser.add_argument("--cases", help="only cases whose names contain one of these, separated by commas")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from tests.toy import prepare_toy

    data = args.work.resolve() / "data"
    if not (data / "meld").is_dir():
        prepare_toy("meld", data, train=64)
    cases = [case for case in CASES if not args.cases or any(part in case.name for part in args.cases.split(","))]
    rows = []
    for procs in map(int, args.procs.split(",")):
        counted = measure(procs, data, args.work.resolve(), cases)
        for case in cases:
            row = {**dataclasses.asdict(case), "procs": procs, **counted[case.name], **theory(case, procs, data)}
            rows.append(row)
            called, planned = sum(row["called"].values()), sum(row["planned"].values())
            print(
                f"{procs} {case.name}: {row['samples_per_second']:.1f} samples/s; MB a step: called {called / 1e6:.2f}, sent "
                f"{'?' if row['sent'] is None else format(row['sent'] / 1e6, '.2f')}, planned {planned / 1e6:.2f}, paper "
                f"{row['paper'] / 1e6:.2f}",
                flush=True,
            )
    if args.out:
        report = {
            "date": today(),
            "command": "python -m benchmarks.scaling --work DIR --out benchmarks/results/scaling.json",
            "machine": describe("torch", "deepspeed"),
            "load_average": [round(n, 1) for n in os.getloadavg()],
            "steps": STEPS,
            "rows": rows,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
