"""What every process of a run must have alike: versions, code, config, data and model.

Each rank, or each node before a run starts, describes itself; one comparison names who has what. It takes milliseconds
under any launcher, and the alternative is a hang or weights that differ in silence.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.config import BackboneConfig, RunConfig, flatten
from trainer.distributed.versions import ABSENT, versions
from trainer.distributed.world import World

WHOLE = 1 << 24  # bytes up to which a model's file is hashed whole; of larger ones both ends are
END = 1 << 20
SHOWN = 4  # names in a message before "and N more"
PATIENCE = 10.0  # seconds until a file that rank 0 wrote must be seen elsewhere (attribute caches of NFS)

Report = dict[str, Any]


class DisagreementError(ValueError):
    """The processes of a run are not alike."""


def check_consistency(config: RunConfig, out: Path, world: World) -> None:
    """Compare all ranks' reports, and see that the run folder is one folder; called by all ranks.

    Raises:
        DisagreementError: on every rank, with every difference and who has what.
    """
    if world.size == 1:
        return
    ours = {**report(config), "where": f"rank {world.rank} on {socket.gethostname()}", "shared": _sees(out, world)}
    faults = differences(world.gather_all(ours))
    if faults:
        raise DisagreementError(format_faults(faults, "the processes of this run are not alike"))


def report(config: RunConfig) -> Report:
    """What this process runs with.

    `where` (host name), `versions` (name -> version), `code` (digest of this package's source), `config` (dotted key ->
    value), `data` (task -> fingerprint) and `model` (name -> fingerprint); what is absent stands in `faults`, as
    subject -> what is wrong and what to do. A hub model that is not in the cache has the fingerprint "none".
    """
    faults: dict[str, str] = {}
    return {
        "where": socket.gethostname(),
        "versions": versions(),
        "config": {key: repr(value) for key, value in flatten(config).items()},
        "data": _data(config, faults),
        "model": _model(config.model.backbone, faults),
        "faults": faults,
    }


def differences(reports: Sequence[Report]) -> list[str]:
    """One line for each thing that differs between `reports`, or is at fault in some; empty when all is well.

    Each report has `where`; of the other keys of :func:`report` those that all of them have are compared.
    """
    lines = _faults(reports)
    for section, noun in (("versions", ""), ("config", "setting "), ("data", "data of "), ("model", "model ")):
        parts = [(r["where"], r[section]) for r in reports if section in r]
        for key in dict.fromkeys(key for _, part in parts for key in part):
            held = _by_value((where, str(part.get(key, ABSENT))) for where, part in parts)
            at_fault = any(key in r.get("faults", {}) for r in reports)
            if len(held) > 1 and not at_fault:
                shown = "; ".join(f"{value[:60]} on {join_truncated(places)}" for value, places in held.items())
                lines.append(f"{noun}{key} differs: {shown}")
    blind = [r["where"] for r in reports if r.get("shared") is False]
    if blind:
        lines.append(
            f"the run folder is not shared: {join_truncated(blind)} cannot see what another process wrote there; "
            "choose an --out on storage that all nodes share"
        )
    return lines


def join_truncated(places: Sequence[str]) -> str:
    """Some names, and how many more."""
    more = len(places) - SHOWN
    return ", ".join(places[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def format_faults(faults: Sequence[str], head: str) -> str:
    """Several faults as one message."""
    return "\n".join(
        [f"{head}: {len(faults)} fault{'' if len(faults) == 1 else 's'}", *(f"  {line}" for line in faults)]
    )


def _faults(reports: Sequence[Report]) -> list[str]:
    held = _by_value((r["where"], what) for r in reports for what in r.get("faults", {}).values())
    return [f"{what} (on {join_truncated(places)})" for what, places in held.items()]


def _by_value(pairs: Any) -> dict[str, list[str]]:
    """value -> the places that have it."""
    held: dict[str, list[str]] = {}
    for where, value in pairs:
        held.setdefault(value, []).append(where)
    return held


def _data(config: RunConfig, faults: dict[str, str]) -> dict[str, str]:
    from trainer.data.dataset import open_dataset
    from trainer.tasks import get_task

    found = {}
    for name in config.tasks:
        try:
            task = get_task(name).name
            found[task] = open_dataset(config.data.path.replace("{task}", task)).fingerprint
        except (ValueError, OSError) as error:
            found[name] = ABSENT
            faults[name] = str(error)
    return found


def _model(config: BackboneConfig, faults: dict[str, str]) -> dict[str, str]:
    if config.name == "tiny":  # built in the run folder
        return {}
    path = Path(config.name).expanduser()
    if not path.is_dir():
        if path.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
            faults[config.name] = f"no model folder {config.name}: copy it there, or name it as that node has it"
            return {config.name: ABSENT}
        cached = _cached(config)
        if cached is None:
            return {config.name: ABSENT}
        path = cached
    return {config.name: folder_fingerprint(path)}


def _cached(config: BackboneConfig) -> Path | None:
    """The folder of a hub model that was downloaded before."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.name, revision=config.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and contents of a model folder's files; of files above 16 MiB over both ends.

    It tells models apart in milliseconds. The frozen weights themselves are hashed when they are loaded.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as handle:
            total.update(handle.read(size if size <= WHOLE else END))
            if size > WHOLE:
                handle.seek(-END, os.SEEK_END)
                total.update(handle.read(END))
    return total.hexdigest()


def _sees(out: Path, world: World) -> bool:
    """Whether a file that rank 0 writes into the run folder is there for this rank too."""
    token = out / f".shared-{world.broadcast_object(secrets.token_hex(8))}"
    with world.on_rank_zero() as first:
        if first:
            try:
                out.mkdir(parents=True, exist_ok=True)
                token.touch()
            except OSError as error:
                raise ValueError(
                    f"the run folder {out} cannot be written: {error.strerror}; choose another with --out"
                ) from error
    seen = wait_until(token.exists, PATIENCE)
    world.barrier()
    if world.is_rank_zero:
        token.unlink(missing_ok=True)
    return seen


def wait_until(there: Callable[[], bool], seconds: float) -> bool:
    """Whether `there()` became true within `seconds`."""
    until = time.monotonic() + seconds
    while not there():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
