"""The machine: processor, memory, places to write, GPUs, attention kernels, and what compiles DeepSpeed's ops."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import torch
from packaging.version import InvalidVersion, Version

from launch.doctor.findings import Findings, State
from launch.units import GIB, MIB
from trainer.config import RunConfig
from trainer.distributed.compiled_ops import extensions_folder, missing_build_tools
from trainer.distributed.deepspeed_config import slow_precision

BUFFER = 64 * MIB  # bytes of /dev/shm per GPU; a container has so many by default, too few for several ranks of NCCL
LITTLE = 4 * GIB  # bytes of memory below which a process with torch and DeepSpeed has little room
SHARED_MEMORY = Path("/dev/shm")


def check_machine(findings: Findings, procs: int) -> None:
    """Processor and memory for `procs` processes."""
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    found = f"{cores} cores, {memory.total / GIB:.1f} GiB memory ({memory.available / GIB:.1f} free), Python {platform.python_version()}"
    values = {"cores": cores, "memory_bytes": memory.total, "free_bytes": memory.available}
    if procs > cores:
        findings.add(
            "machine", "processor", "warning", found, f"{procs} processes share {cores} cores: use fewer", **values
        )
    elif memory.available < LITTLE:
        findings.add("machine", "processor", "warning", found, "little memory is free: end other programs", **values)
    else:
        findings.add("machine", "processor", "ok", found, **values)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(SHARED_MEMORY).free
        found = f"{SHARED_MEMORY} has {free / MIB:.0f} MiB free"
        if torch.cuda.is_available() and free < BUFFER * procs:
            advice = "a container gets more by --shm-size=8g (docker) or an emptyDir of medium Memory (Kubernetes)"
            findings.add(
                "machine", "shared memory", "fault" if procs > 1 else "warning", found, advice, free_bytes=free
            )
        else:
            findings.add("machine", "shared memory", "ok", found, free_bytes=free)


def check_gpus(findings: Findings, config: RunConfig | None, procs: int) -> None:
    """GPUs, and whether this torch and this config can use them."""
    driver, count = driver_version(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if driver is None:
            slow = None if config is None else slow_precision(config, torch.device("cpu"))
            found = "none: training on the CPU, over gloo"
            findings.add("GPU", "devices", "warning" if slow else "ok", found, slow or "")
        elif torch.version.cuda is None:
            findings.add(
                "GPU", "devices", "fault", f"driver {driver}, but torch {torch.__version__} is built for CPUs alone",
                "install a torch with CUDA (the first line of its install page), then the other packages again",
            )  # fmt: skip
        else:
            findings.add(
                "GPU", "devices", "fault", f"driver {driver}, but torch sees no GPU: {_cuda_error()}",
                "look at CUDA_VISIBLE_DEVICES, at nvidia-smi, and at the pairs of versions below",
            )  # fmt: skip
        return
    names, faults, warnings = [], [], []
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0]
        names.append(f"{about.name} ({about.total_memory / GIB:.0f} GiB, {free / GIB:.0f} free)")
        if not _built_for(about.major, about.minor):
            faults.append(f"GPU {number}: torch has no code for its architecture sm_{about.major}{about.minor}")
        if free < 0.9 * about.total_memory:
            warnings.append(f"GPU {number}: another program holds {(about.total_memory - free) / GIB:.1f} GiB")
    if config is not None and config.train.precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        warnings.append("train.precision=bf16 is only emulated here: use fp16")
    if procs > count:
        faults.append(f"{procs} processes for {count} GPUs: use --procs {count}")
    state: State = "fault" if faults else "warning" if warnings else "ok"
    found = f"{', '.join(names)}; driver {driver or 'unknown'}, torch's CUDA {torch.version.cuda}"
    findings.add(
        "GPU", "devices", state, found, "; ".join([*faults, *warnings]), driver=driver and str(driver), count=count
    )


def check_attention(findings: Findings, config: RunConfig | None) -> None:
    """Whether flash-attn, and the attention that is asked for, can run, and why not; Triton."""
    from trainer.distributed.deepspeed_config import dtype_of
    from trainer.models.backbone.loading import NO_CUDA_EXTENSION, UnusableAttention, resolve_attention

    asked = config.model.backbone.attention if config is not None else "auto"
    dtype = dtype_of(config) if config is not None else torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve_attention("flash_attention_2", device, dtype)
        findings.add("kernels", "flash-attn", "ok", "usable")
    except UnusableAttention as error:
        why = "; ".join(error.reasons)
        wanted = asked == "flash_attention_2"
        without_cuda = NO_CUDA_EXTENSION in error.reasons
        advice = "model.backbone.attention=auto" if wanted else ""
        if without_cuda or (device.type == "cuda" and "cannot be imported" in why):
            advice = "with the CUDA toolkit there: pip install flash-attn --no-build-isolation --no-cache-dir"
        state: State = "fault" if wanted else "warning" if without_cuda else "ok"
        findings.add("kernels", "flash-attn", state, f"not usable, PyTorch's own attention is used: {why}", advice)
    if asked not in ("auto", "flash_attention_2"):
        try:
            resolve_attention(asked, device, dtype)
        except UnusableAttention as error:
            findings.add("kernels", "attention", "fault", str(error), "model.backbone.attention=auto")
    if importlib.util.find_spec("triton") is None:
        findings.add(
            "kernels", "Triton", "ok", "not installed: the plain PyTorch operations are used",
            "pip install 'egmf-trainer[cuda]' on a machine with GPUs" if device.type == "cuda" else "",
        )  # fmt: skip
        return
    try:
        importlib.import_module("triton")
        there = device.type == "cuda"
        findings.add("kernels", "Triton", "ok", "usable" if there else "installed; it has no GPU here and is not used")
    except Exception as error:  # noqa: BLE001
        findings.add("kernels", "Triton", "warning", f"cannot be imported: {error}", "install it again, or remove it")


def check_build(findings: Findings, config: RunConfig | None) -> None:
    """Compiler and ninja, and DeepSpeed's ops that are compiled already."""
    missing = missing_build_tools()
    offloads = config is not None and config.train.offload == "cpu"
    if missing:
        found = f"no {' and no '.join(missing)} on PATH"
        state: State = "fault" if offloads else "ok"
        what = "train.offload=cpu cannot run" if offloads else "only train.offload=cpu needs them"
        findings.add(
            "build", "compiler", state, f"{found}: {what}", "apt-get install g++ python3-dev; pip install ninja"
        )
    else:
        findings.add("build", "compiler", "ok", "C++ compiler and ninja are there")
    root = extensions_folder()
    built = {path.parent.name: path for path in root.glob("*/*.so")}
    wanted = ["cpu_adam"] if offloads and not missing else []
    cold = [name for name in wanted if name not in built]
    other = [name for name, path in built.items() if name in wanted and _built_with_another_torch(path.parent)]
    found = f"compiled: {', '.join(sorted(built)) or 'none'} (in {root})"
    if other:
        findings.add(
            "build", "DeepSpeed's ops", "warning", f"{', '.join(other)} compiled with another torch", f"rm -r {root}"
        )
    elif cold:
        advice = f"{', '.join(cold)}: compiled by the first run, about a minute"
        findings.add("build", "DeepSpeed's ops", "ok", found, advice)
    else:
        findings.add("build", "DeepSpeed's ops", "ok", found)


def check_folder(findings: Findings, out: Path) -> None:
    """Whether the run folder's place can be written, renamed in and locked, and its free space."""
    place = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".egmf-doctor-", dir=place) as name:
            first, second = Path(name) / "a", Path(name) / "b"
            with first.open("w", encoding="utf-8") as file:
                file.write("egmf")
                file.flush()
                os.fsync(file.fileno())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first.rename(second)
            assert second.read_text(encoding="utf-8") == "egmf"
    except OSError as error:
        findings.add(
            "folder", "run folder", "fault", f"{place} cannot be written: {error.strerror}",
            "make it writable, or choose another with --out",
        )  # fmt: skip
        return
    free = shutil.disk_usage(place).free
    findings.add("folder", "run folder", "ok", f"{place} can be written; {free / GIB:.1f} GiB free", free_bytes=free)


def driver_version() -> Version | None:
    """The NVIDIA driver's version, from the kernel module or nvidia-smi; None where there is none."""
    with contextlib.suppress(OSError):
        for word in Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split():
            with contextlib.suppress(InvalidVersion):
                if "." in word:
                    return Version(word)
    with contextlib.suppress(OSError, subprocess.SubprocessError, InvalidVersion, IndexError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return Version(subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0])
    return None


def processor_flags() -> frozenset[str]:
    """The processor's features, as Linux names them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _built_for(major: int, minor: int) -> bool:
    """Whether torch has code for a GPU of this architecture: same major and not newer, or PTX of an older one."""
    architectures: list[str] = torch.cuda.get_arch_list()
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = digits.rstrip("af")
        if not number.isdigit():
            continue
        built = int(number[:-1]), int(number[-1])
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not architectures


def _built_with_another_torch(folder: Path) -> bool:
    """Whether an op's build names include folders of another torch than this one."""
    with contextlib.suppress(OSError):
        rules = (folder / "build.ninja").read_text(encoding="utf-8")
        return str(Path(torch.__file__).parent / "include") not in rules
    return False


def _cuda_error() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no device is visible"
