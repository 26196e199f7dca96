"""What DeepSpeed compiles at run time: its Adam for an optimizer in host memory, and nothing else."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger(__name__)


def missing_build_tools() -> list[str]:
    """What DeepSpeed needs to compile its CPU ops and PATH does not have."""
    tools = (("C++ compiler", ("c++", "g++", "clang++")), ("ninja", ("ninja",)))
    return [what for what, names in tools if not any(map(shutil.which, names))]


def extensions_folder() -> Path:
    """Where compiled ops are kept: ``TORCH_EXTENSIONS_DIR``, or a folder of the user's cache."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "egmf" / "torch_extensions"))


def no_shared_memory_op() -> None:
    """Keep ``init_distributed`` on CPUs from compiling DeepSpeed's shared-memory all-reduce.

    Only its tensor-parallel inference layers call it (deepspeed 0.19, ``inference_all_reduce``). It would take a C++ compiler,
    a minute, and 66 MiB of ``/dev/shm`` per rank, which DeepSpeed does not give back.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def compile_cpu_adam() -> None:
    """Compile DeepSpeed's CPU Adam, one process of this machine at a time; a second call loads what the first compiled."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder, root = CPUAdamBuilder(), extensions_folder()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".egmf.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (root / builder.NAME / "lock").unlink(missing_ok=True)  # of a build that was killed: torch would wait for ever
        if not any((root / builder.NAME).glob("*.so")):
            log.info("compiling DeepSpeed's CPU Adam, once: about a minute")
        builder.load()
