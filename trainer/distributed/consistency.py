"""What must be the same on every rank of a run: versions, code, config, data and model.

Each rank, or each node before a run starts, describes itself; one comparison lists who has what. It takes milliseconds
under any launcher, and the alternative is a hang, or weights that differ without a word.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from trainer.config import BackboneConfig, RunConfig, flatten
from trainer.distributed.messages import format_faults, group_by_value, join_truncated
from trainer.distributed.versions import ABSENT, versions
from trainer.distributed.world import World

WHOLE = 1 << 24  # bytes up to which a model's file is hashed whole; larger ones are hashed at both ends
END = 1 << 20
PATIENCE = 10.0  # seconds until a file that rank 0 wrote must be seen elsewhere (attribute caches of NFS)

DISAGREE = "ranks disagree on versions, config, data or model"
Section = Literal["versions", "config", "data", "model"]
SECTIONS: tuple[tuple[Section, str], ...] = (
    ("versions", ""),
    ("config", "setting "),
    ("data", "data of "),
    ("model", "model "),
)


class Report(TypedDict, total=False):
    """What a process runs with. Sections that all reports have are compared, key by key."""

    where: str  # host name, or rank and host name; always there
    versions: dict[str, str]  # name -> version; the package's own source and commit too
    config: dict[str, str]  # dotted key -> value
    data: dict[str, str]  # task -> fingerprint
    model: dict[str, str]  # name -> fingerprint
    faults: dict[str, str]  # what is absent -> what is wrong and what to do
    shared: bool  # whether this process sees what rank 0 writes into the run folder


class DisagreementError(ValueError):
    """The ranks of a run differ in what must be the same."""


def check_consistency(config: RunConfig, out: Path, world: World) -> None:
    """Compare all ranks' reports, and see that the run folder is one folder; called by all ranks.

    Raises:
        DisagreementError: on every rank, with every difference and who has what.
    """
    if world.size == 1:
        return
    own = report(config)
    own["where"] = f"rank {world.rank} on {socket.gethostname()}"
    own["shared"] = _sees(out, world)
    faults = differences(world.gather_all(own))
    if faults:
        raise DisagreementError(format_faults(faults, DISAGREE))


def report(config: RunConfig) -> Report:
    """What this process runs with. A hub model that is not in the cache has the fingerprint "none"."""
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
    for section, noun in SECTIONS:
        parts = [(r["where"], r[section]) for r in reports if section in r]
        for key in dict.fromkeys(key for _, part in parts for key in part):
            places_of = group_by_value((where, str(part.get(key, ABSENT))) for where, part in parts)
            at_fault = any(key in r.get("faults", {}) for r in reports)
            if len(places_of) > 1 and not at_fault:
                values = "; ".join(f"{value[:60]} on {join_truncated(places)}" for value, places in places_of.items())
                lines.append(f"{noun}{key} differs: {values}")
    blind = [r["where"] for r in reports if r.get("shared") is False]
    if blind:
        lines.append(
            f"the run folder is not shared: {join_truncated(blind)} cannot see what another process wrote there; "
            "choose an --out on storage that all nodes share"
        )
    return lines


def _faults(reports: Sequence[Report]) -> list[str]:
    places_of = group_by_value((r["where"], fault) for r in reports for fault in r.get("faults", {}).values())
    return [f"{fault} (on {join_truncated(places)})" for fault, places in places_of.items()]


def _data(config: RunConfig, faults: dict[str, str]) -> dict[str, str]:
    from trainer.data.dataset import open_dataset
    from trainer.questions import find_run_tasks

    found = {}
    asked, wrong = find_run_tasks(config.tasks)
    for fault in wrong:
        found[fault], faults[fault] = ABSENT, fault
    for one in asked:
        name = one.task.name
        try:
            found[name] = open_dataset(one.path(config.data.path)).fingerprint
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


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition()` became true within `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
