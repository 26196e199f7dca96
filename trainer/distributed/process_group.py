"""Joining and leaving the process group, through DeepSpeed's own initialisation; and what must be set before it.

Works under the ``deepspeed`` launcher, ``torchrun`` and ``srun`` (they set RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT), and as a single process with none of these.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.distributed.compiled_ops import extensions_folder, no_shared_memory_op
from trainer.distributed.flight import turn_on
from trainer.distributed.launcher import RENDEZVOUS_VARIABLES
from trainer.distributed.light_imports import import_libraries
from trainer.distributed.rendezvous import SECONDS, local_size, rendezvous
from trainer.distributed.world import World
from trainer.logs import captured_stdout

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the name, and its older ones


def start_world(seconds: float = SECONDS, *, trains: bool = True) -> World:
    """Join the run's ranks (or be the only one), through DeepSpeed's own initialisation.

    On CPU the backend is gloo.

    Args:
        seconds: that each rank waits for the others.
        trains: false where a process that is the only one needs neither DeepSpeed nor a process group.

    Raises:
        ValueError: a launcher set some but not all of the variables of a rendezvous, or the rendezvous failed
            (:func:`trainer.distributed.rendezvous.rendezvous`).
    """
    _check_launcher()
    distributed = trains or os.environ["WORLD_SIZE"] != "1"
    import_libraries(trains=distributed)
    device = choose_device()
    if device.type == "cpu":
        _share_cores()
    if not distributed:
        return World(0, 1, device)
    import deepspeed

    if device.type == "cpu":
        no_shared_memory_op()
    turn_on(os.environ, nccl=device.type == "cuda")
    with rendezvous(seconds, gpu_identity(device)), captured_stdout():
        deepspeed.init_distributed(verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), device)


def choose_device() -> torch.device:
    """This rank's device: the GPU of its LOCAL_RANK among those that it sees, or the CPU where it sees none.

    A launcher may show each rank its own GPU alone (Slurm's ``--gpus-per-task``), whose index is 0 whatever the LOCAL_RANK.
    LOCAL_RANK becomes the index that is used, since DeepSpeed reads it by itself. Ranks that come to share a GPU are refused at the rendezvous.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return torch.device("cpu")
    if not any(name in os.environ for name in ALLOCATOR):
        # rows of every length would leave gaps behind; read when the device is first used
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    index = int(os.environ.get("LOCAL_RANK", 0)) % count
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    # cuDNN's attention, which torch prefers on compute capability 9.0, makes a plan for every new shape, and each micro-batch has one
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", index)


def gpu_identity(device: torch.device) -> str | None:
    """What tells a GPU from every other of its machine, in any process; None for the CPU, and where torch does not say."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    part = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # parts of one GPU may share its id
    return None if uuid is None else f"{uuid} {part}" if part.startswith("MIG-") else str(uuid)


def stop_world() -> None:
    """Leave the process group; safe to call more than once."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_deepspeed() -> None:
    """Set what DeepSpeed reads when it is imported; call before any import of it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    # an environment that is not activated (ssh) has its ninja beside its python; another version would rebuild every op
    ninja = Path(sys.executable).parent / "ninja"
    if ninja.exists() and shutil.which("ninja") != str(ninja):
        os.environ["PATH"] = f"{ninja.parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _share_cores() -> None:
    """Each process of a machine computes on its share of the cores, also where the launcher sets no OMP_NUM_THREADS."""
    ranks = local_size()
    if ranks and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


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
