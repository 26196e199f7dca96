"""``egmf doctor``: is everything there that a run needs, and does it work together? All checks, one list of findings."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from packaging.version import Version

from launch.doctor import collective_probe, versions
from launch.doctor.collective_probe import AllReduce, LargestBatch, ProbeResult
from launch.doctor.findings import Check, Findings, State
from launch.doctor.machine import (
    check_attention,
    check_build,
    check_folder,
    check_gpus,
    check_machine,
    driver_version,
    processor_flags,
)
from launch.doctor.resolved_config import ResolvedConfig, check_resolved_config
from launch.start.hostfile import read_hostfile
from launch.start.local import Workers, forward_signals, single_node_ranks
from launch.start.node_check import check_nodes
from launch.units import GIB
from trainer.distributed.deepspeed_config import zero_stage
from trainer.distributed.world import World

PART = "ranks"
PROBE_SECONDS = 1800.0  # that the probe on all ranks may take
SLOW = 0.1  # GB/s; a slower all-reduce is a warning, on one machine too
FULL = 0.92  # share of a GPU's memory above which a run has no room


def examine(
    config: Path | None, overrides: Sequence[str], out: Path, procs: int, hostfile: Path | None = None
) -> list[Check]:
    """Every check of this machine, with `procs` processes started for those that need all ranks.

    With a `hostfile` every node in it is asked over ssh what it has, and the answers are compared.
    """
    findings = Findings()
    if hostfile is not None and config is not None:
        _ask_nodes(findings, hostfile, config, overrides, out)
    with tempfile.TemporaryDirectory(prefix="egmf-doctor-") as name:
        scratch = Path(name)
        resolved = _check_this_machine(findings, config, overrides, out, procs, scratch)
        probed = _config_to_probe(findings, config, resolved)
        run = [str(probed), *overrides] if probed else []
        failure = _probe_on_ranks([sys.executable, "-m", "launch.doctor.collective_probe", name, *run], procs)
        _judge_probe(findings, scratch, out, failure, batch=probed is not None)
    return findings.checks


def examine_here(config: Path | None, overrides: Sequence[str], out: Path, world: World) -> list[Check]:
    """The same under a launcher that has started the ranks: every rank calls this, and rank 0 gets the findings."""
    findings = Findings()
    scratch: Path | None = None
    resolved: ResolvedConfig | None = None
    with world.on_rank_zero() as first:
        if first:  # beside the run folder: the ranks' machines share that place
            place = next(path for path in (out.resolve(), *out.resolve().parents) if path.is_dir())
            scratch = Path(tempfile.mkdtemp(prefix=".egmf-doctor-", dir=place))
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            resolved = _check_this_machine(findings, config, overrides, out, local_size, scratch)
    scratch, ready = world.broadcast_object((scratch, resolved is not None and resolved.complete))
    assert scratch is not None
    try:
        probed = _config_to_probe(findings, config, resolved) if world.is_rank_zero else None
        failure = _probe_on_this_rank(config if ready else None, overrides, scratch, world)
        if world.is_rank_zero:
            _judge_probe(findings, scratch, out, failure, batch=probed is not None)
    finally:
        if world.is_rank_zero:
            shutil.rmtree(scratch, ignore_errors=True)
    return findings.checks


def _check_this_machine(
    findings: Findings, config: Path | None, overrides: Sequence[str], out: Path, procs: int, scratch: Path
) -> ResolvedConfig | None:
    """All that one process can find."""
    resolved = None
    if config is not None:
        resolved = check_resolved_config(findings, config, overrides, scratch)
    loaded = None if resolved is None else resolved.config
    check_machine(findings, procs)
    check_gpus(findings, loaded, procs)
    versions.check_ranges(findings)
    facts = versions.Facts(
        versions.installed(versions.LISTED),
        cuda=Version(torch.version.cuda) if torch.version.cuda and torch.cuda.is_available() else None,
        driver=driver_version(),
        flags=processor_flags(),
        bitsandbytes_libraries=versions.bitsandbytes_libraries(),
        quantized=loaded is not None and loaded.model.backbone.quantization == "nf4",
        zero=None if loaded is None else zero_stage(loaded),
    )
    versions.check_pairs(findings, facts)
    check_attention(findings, loaded)
    check_build(findings, loaded)
    check_folder(findings, out)
    return resolved


def _ask_nodes(findings: Findings, hostfile: Path, config: Path, overrides: Sequence[str], out: Path) -> None:
    there = out.exists()
    with findings.explained("nodes", "nodes"):
        for report in check_nodes(read_hostfile(hostfile), config, overrides, out):
            gpus = f"{len(report['gpus'])} GPUs ({report['gpus'][0]})" if report["gpus"] else "no GPU"
            free = report["run_folder"]["free_gib"]
            parts = f"{report['cpus']} cores, {report['memory_gib']} GiB memory, {gpus}; {free} GiB free"
            findings.add("nodes", report["where"], "ok", f"like the others; {parts}", report=report)
    if not there:  # made for the nodes to see
        with contextlib.suppress(OSError):
            out.rmdir()


def _config_to_probe(findings: Findings, config: Path | None, resolved: ResolvedConfig | None) -> Path | None:
    """The config whose largest batch is tried; None, and a finding, where something of it is missing."""
    if resolved is not None and resolved.complete:
        return config
    if config is not None:
        findings.add(PART, "largest batch", "skipped", "not tried: config, data or model is not there (see above)")
    return None


def _probe_on_ranks(command: Sequence[str], procs: int) -> str | None:
    """Run `command` on `procs` ranks; None, or why it failed."""
    late = threading.Event()
    with Workers(single_node_ranks(command, procs), "local") as workers, forward_signals(workers.signal):

        def give_up() -> None:
            late.set()
            workers.end()

        timer = threading.Timer(PROBE_SECONDS, give_up)
        timer.start()
        try:
            outcome = workers.wait()
        finally:
            timer.cancel()
    if late.is_set():
        return f"the ranks did not end within {PROBE_SECONDS / 60:.0f} minutes"
    return None if outcome.rank is None else f"rank {outcome.rank}: {outcome.reason}"


def _probe_on_this_rank(config: Path | None, overrides: Sequence[str], scratch: Path, world: World) -> str | None:
    try:
        collective_probe.run(config, overrides, scratch, world)
    except Exception as error:
        if not world.is_rank_zero:
            raise
        return f"{type(error).__name__}: {error}"
    return None


def _judge_probe(findings: Findings, scratch: Path, out: Path, failure: str | None, *, batch: bool) -> None:
    """What the ranks found, and where they stopped."""
    result = scratch / collective_probe.RESULT
    found: ProbeResult = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    if "all_reduce" not in found:
        findings.add(
            PART,
            "all-reduce",
            "fault",
            f"it did not work: {failure}",
            "see docs/clusters.md, when the processes do not find each other",
        )
        return
    _judge_all_reduce(findings, found["all_reduce"])
    if not batch:
        return
    if "batch" not in found:
        findings.add(PART, "largest batch", "fault", f"it did not work: {failure}")
        return
    _judge_batch(findings, found["batch"], out)


def _judge_all_reduce(findings: Findings, found: AllReduce) -> None:
    if found["world"] == 1:
        findings.add(PART, "all-reduce", "skipped", "one process: nothing to reduce; --procs starts more", **found)
        return
    small, large = (found["sizes"][str(size)] for size in collective_probe.SIZES)
    bandwidth = large["bus_gb_per_second"]
    summary = f"{found['world']} ranks over {found['backend']}: 64 MiB at {bandwidth:.2f} GB/s (bus), 1 MiB in {1e3 * small['seconds']:.1f} ms"
    if bandwidth < SLOW:
        advice = "slow: is the right network interface used? (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        findings.add(PART, "all-reduce", "warning", summary, advice, **found)
    else:
        findings.add(PART, "all-reduce", "ok", summary, **found)


def _judge_batch(findings: Findings, found: LargestBatch, out: Path) -> None:
    summary = f"forward, backward and scored in {found['seconds']:.1f} s; at most {found['peak_bytes'] / GIB:.2f} GiB"
    tight = torch.cuda.is_available() and found["peak_bytes"] > FULL * torch.cuda.get_device_properties(0).total_memory
    advice = "close to the GPU's memory: smaller train.micro_tokens, or model.backbone.gradient_checkpointing=true"
    findings.add(PART, "largest batch", "warning" if tight else "ok", summary, advice if tight else "", **found)
    place = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, found["checkpoints_bytes"]
    summary = (
        f"{found['trained_parameters']:,} parameters are trained: {found['checkpoint_bytes'] / GIB:.2f} GiB a checkpoint, "
        f"{needed / GIB:.2f} GiB in all; {free / GIB:.1f} GiB are free"
    )
    state: State = "fault" if needed > free else "warning" if needed > free / 2 else "ok"
    advice = "" if state == "ok" else "make room, choose another --out, or lower train.keep"
    findings.add("folder", "checkpoints", state, summary, advice, needed_bytes=needed, free_bytes=free)
