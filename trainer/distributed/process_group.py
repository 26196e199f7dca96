"""Joining and leaving the process group, through DeepSpeed's own initialisation; and what must be set before it.

Works under the ``deepspeed`` launcher, ``torchrun`` and ``srun`` (they set RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT), and as a single process with none of these.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.distributed.launcher import RENDEZVOUS_VARIABLES
from trainer.distributed.light_imports import import_libraries
from trainer.distributed.rendezvous import SECONDS, local_size, rendezvous
from trainer.distributed.world import World
from trainer.logs import captured_stdout

log = logging.getLogger(__name__)


def start_world(seconds: float = SECONDS) -> World:
    """Join the run's ranks (or be the only one), through DeepSpeed's own initialisation.

    On CPU the backend is gloo. DeepSpeed's shared-memory all-reduce is compiled on first use; without a C++ compiler or
    ninja it is left out with one warning.

    Args:
        seconds: that each rank waits for the others.

    Raises:
        ValueError: a launcher set some but not all of the variables of a rendezvous, or the rendezvous failed
            (:func:`trainer.distributed.rendezvous.rendezvous`).
    """
    _check_launcher()
    import_libraries()
    import deepspeed

    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        _share_cores()
        _shared_memory_op()
    with rendezvous(seconds), captured_stdout():
        deepspeed.init_distributed(verbose=False)
    world = World(dist.get_rank(), dist.get_world_size(), device)
    _unlink_shared_memory(world)
    return world


def stop_world() -> None:
    """Leave the process group; safe to call more than once."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_deepspeed() -> None:
    """Set what DeepSpeed reads when it is imported; call before any import of it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "egmf" / "torch_extensions"))
    # an environment that is not activated (ssh) has its ninja beside its python; another version would rebuild every op
    ninja = Path(sys.executable).parent / "ninja"
    if ninja.exists() and shutil.which("ninja") != str(ninja):
        os.environ["PATH"] = f"{ninja.parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _share_cores() -> None:
    """Each process of a machine computes on its share of the cores, also where the launcher sets no OMP_NUM_THREADS."""
    ranks = local_size()
    if ranks and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def _unlink_shared_memory(world: World) -> None:
    """Remove the names of DeepSpeed's shared-memory buffers once all ranks have opened them, so that none is left however we end.

    DeepSpeed does not: its single-node launcher leaves about 66 MiB per rank behind (deepspeed 0.19).
    """
    world.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}").unlink(missing_ok=True)


def missing_build_tools() -> list[str]:
    """What DeepSpeed needs to compile its CPU ops and PATH does not have."""
    tools = (("C++ compiler", ("c++", "g++", "clang++")), ("ninja", ("ninja",)))
    return [what for what, names in tools if not any(map(shutil.which, names))]


def _check_launcher() -> None:
    present = [key for key in RENDEZVOUS_VARIABLES if key in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(present):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        single = ("0", "1", "0", "127.0.0.1", str(port))
        os.environ.update(zip(RENDEZVOUS_VARIABLES, single, strict=True))
        return
    absent = [key for key in RENDEZVOUS_VARIABLES if key not in os.environ]
    if absent:
        raise ValueError(
            f"{', '.join(present)} set but {', '.join(absent)} not: start the processes with 'egmf launch', 'deepspeed' or "
            "'torchrun', or unset these variables to train in one process"
        )


def _shared_memory_op() -> None:
    """Build DeepSpeed's shared-memory op one process at a time, or switch it off where it cannot be built."""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    missing = missing_build_tools()
    if missing:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if os.environ["RANK"] == "0":
            log.warning(
                "no %s on PATH: DeepSpeed's shared-memory all-reduce is off, gloo is used", " and no ".join(missing)
            )
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    root = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".egmf.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for stale in root.glob(
            f"{builder.NAME}/lock"
        ):  # left by a build that was killed: torch would wait on it for ever
            stale.unlink()
        if not any(root.glob(f"{builder.NAME}/*.so")) and os.environ["RANK"] == "0":
            log.info("compiling DeepSpeed's shared-memory all-reduce, once: about a minute")
        builder.load()


if __name__ == "__main__":  # builds the shared-memory op ahead of time: make ops
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_deepspeed()
    _check_launcher()
    if not torch.cuda.is_available():
        _shared_memory_op()
