"""What only the ranks together can show: an all-reduce with its bandwidth, then the largest batch forward and backward.

``python -m launch.doctor.collective_probe FOLDER [CONFIG [overrides]]`` on every rank; rank 0 writes FOLDER/probe.json.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from launch.units import MIB

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.distributed.world import World

RESULT = "probe.json"
SIZES = (MIB, 64 * MIB)
REPEATS = 5
STUCK_SECONDS = 60.0  # without progress, after which the probe is given up
HEADROOM = 2  # checkpoints that exist beside those kept: the best, and the one being written


class Transfer(TypedDict):
    """An all-reduce of one size, on the slowest rank."""

    seconds: float
    bus_gb_per_second: float


class AllReduce(TypedDict):
    """What :func:`all_reduce` measures; `sizes` by bytes."""

    world: int
    backend: str
    sizes: dict[str, Transfer]


class LargestBatch(TypedDict):
    """What :func:`largest_batch` measures, of the rank with most, and what checkpoints take."""

    seconds: float
    peak_bytes: int  # of the GPU; of the whole process on a CPU
    trained_parameters: int
    checkpoint_bytes: int
    checkpoints_bytes: int  # of all that exist at a time


class ProbeResult(TypedDict, total=False):
    """What rank 0 writes, as far as the ranks got."""

    all_reduce: AllReduce
    batch: LargestBatch


def all_reduce(world: World) -> AllReduce:
    """Seconds and bandwidth of an all-reduce in fp32, of the slowest rank.

    `bus_gb_per_second` = bytes / seconds * 2 (n - 1) / n, what each rank's link carries in a ring, which does not
    depend on the number of ranks n (nccl-tests, doc/PERFORMANCE.md).

    Raises:
        ValueError: a sum is wrong.
    """
    import torch

    sizes: dict[str, Transfer] = {}
    for size in SIZES:
        values = torch.full((size // 4,), float(world.rank + 1), device=world.device)
        times = []
        for _ in range(REPEATS + 1):
            reduced = values.clone()
            world.barrier()
            began = time.perf_counter()
            world.sum(reduced)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        expected = world.size * (world.size + 1) / 2
        if not bool((reduced == expected).all()):
            raise ValueError(
                f"an all-reduce gave {torch.unique(reduced).tolist()[:4]} and not {expected} on rank {world.rank}"
            )
        seconds = max(world.gather_all(statistics.median(times[1:])))
        bus = size / seconds * 2 * (world.size - 1) / world.size
        sizes[str(size)] = {"seconds": seconds, "bus_gb_per_second": bus / 1e9}
    return {"world": world.size, "backend": "nccl" if world.device.type == "cuda" else "gloo", "sizes": sizes}


def largest_batch(config: RunConfig, folder: Path, world: World) -> LargestBatch:
    """The largest micro-batch of every task forward and backward, and the largest evaluation batch; nothing is trained.

    A checkpoint holds the weights that are trained twice, their copies in fp32 and Adam's two moments.

    Raises:
        ValueError: what :func:`trainer.run.guards.probe.probe` raises.
    """
    import torch

    from trainer.distributed.deepspeed_config import check_machine, dtype_of
    from trainer.run.assemble import assemble
    from trainer.run.engine import build_engine
    from trainer.run.guards.guard import Guard
    from trainer.run.guards.probe import probe

    check_machine(config, world.device)
    dtype = dtype_of(config)
    parts = assemble(config, folder, world, dtype, partition=True)
    engine = build_engine(parts.model, config)
    guard = Guard(engine, world.device, gradients=dtype is not torch.float16)
    began = time.perf_counter()
    probe(engine, parts, config, world, guard)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parts.model.parameters() if p.requires_grad)
    one = trained * (2 * dtype.itemsize + 12)
    return {
        "seconds": max(world.gather_all(time.perf_counter() - began)),
        "peak_bytes": max(world.gather_all(peak)),
        "trained_parameters": trained,
        "checkpoint_bytes": one,
        "checkpoints_bytes": one * (config.train.keep + HEADROOM),
    }


def run(path: Path | None, overrides: Sequence[str], folder: Path, world: World) -> None:
    """Both measurements, on every rank; what rank 0 finds is in FOLDER/probe.json as soon as it is found."""
    from trainer.config import load_config
    from trainer.distributed.watch import Watch
    from trainer.files import write_json

    with Watch(folder, world, STUCK_SECONDS) as watch:
        watch.started()
        found: ProbeResult = {"all_reduce": all_reduce(world)}
    if world.is_rank_zero:
        write_json(folder / RESULT, found)
    if path is None:
        return
    with Watch(folder, world, STUCK_SECONDS):  # loading and compiling have their own, longer allowance
        found["batch"] = largest_batch(load_config(path, overrides), folder, world)
    if world.is_rank_zero:
        write_json(folder / RESULT, found)


def main(arguments: Sequence[str]) -> int:
    """Both measurements on this rank, which a launcher started; 1 where one is at fault."""
    from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    from trainer.distributed.faults import report_to_launcher
    from trainer.distributed.process_group import start_world, stop_world
    from trainer.logs import set_up_logging

    set_up_logging(None, int(os.environ.get("RANK", "0")))
    folder, *rest = arguments
    try:
        world = start_world()
        run(Path(rest[0]) if rest else None, rest[1:], Path(folder), world)
    except Exception as error:  # noqa: BLE001
        report_to_launcher(error)
        os._exit(1)  # leaving the process group would wait for the others
    stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
