"""``state.json`` of a checkpoint: where the run stood and what it was, and whether another run may continue it."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.checkpoint.identity import RunIdentity, completed_settings
from trainer.checkpoint.weights import CheckpointError
from trainer.files import load_json
from trainer.models.backbone.fingerprint import SOURCE, BaseFingerprint
from trainer.saved_config import OFF
from trainer.text import Joining

log = logging.getLogger(__name__)

FORMAT = 1  # of a checkpoint's files; raised when older ones can no longer be read
STATE = "state.json"
ANEW = "start anew with another --out or train.resume=never"


class Position(BaseModel):
    """How far the training is."""

    step: int = 0
    epoch: float = 0.0


class SelectionState(BaseModel):
    """Of :class:`trainer.checkpoint.selection.Selection`."""

    best: str | None
    validations: dict[str, dict[str, float]]
    nll: dict[str, dict[str, float | None]]
    metrics: dict[str, str] = {}  # task -> the metric of `validations`; empty where an older version wrote it


class LossMonitorState(BaseModel):
    """Of :class:`trainer.run.guards.guard.LossMonitor`."""

    skipped: int = 0
    in_a_row: int = 0
    spikes: int = 0
    recent: list[float] = []
    overflowed: int = 0  # steps that fp16's loss scaling skipped, for which the schedule waited


class CheckpointState(RunIdentity):
    """The identity of the run that wrote a checkpoint, where it stood, and what its validations have found."""

    step: int
    best: str | None = None
    selection: SelectionState
    health: LossMonitorState
    position: Position
    mlflow_run: str | None = None
    validation_due: bool = False
    format: int = FORMAT
    version: str | None = None  # of egmf-trainer
    joining: Joining = "apart"  # of the prompt's pieces; versions that do not say so tokenised them apart


def this_version() -> str | None:
    """The installed version of egmf-trainer."""
    try:
        return importlib.metadata.version("egmf-trainer")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_format(found: Any, where: Path, version: str | None = None) -> None:
    """Refuse a checkpoint of another format than this version's.

    Raises:
        CheckpointError: what to do about it.
    """
    if found == FORMAT:
        return
    writer = f"version {version}" if version else "the version that wrote it"
    raise CheckpointError(
        f"{where} has checkpoint format {found!r}, and this version of egmf-trainer ({this_version() or 'unknown'}) reads "
        f"format {FORMAT}: use {writer}, or {ANEW}"
    )


def read_state(checkpoint: Path) -> CheckpointState:
    """The record beside a checkpoint's weights.

    Raises:
        CheckpointError: it cannot be read, or has another format.
    """
    path = checkpoint / STATE
    try:
        raw = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {STATE} holds no object")
    check_format(raw.get("format"), checkpoint, raw.get("version"))
    try:
        return CheckpointState.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3])
        raise CheckpointError(
            f"{path} does not have what this version of egmf-trainer expects ({faults}): use the version that wrote it, or {ANEW}"
        ) from error


def is_other_base(state: CheckpointState, now: BaseFingerprint, checkpoint: Path) -> bool:
    """Whether a checkpoint's frozen base is another than `now`'s; see :func:`differs_from_base`."""
    before = state.settings
    doubly = before.get("model.backbone.quantization") == "nf4" and before.get(
        "model.backbone.double_quantization", True
    )
    return differs_from_base(state.base, now, doubly, checkpoint)


def differs_from_base(recorded: str, now: BaseFingerprint, doubly: bool, where: Path) -> bool:
    """Whether the frozen base that `recorded` is the hash of is another than `now`'s.

    Earlier versions recorded the hash of what is stored. Of doubly quantised weights that hangs on threads and devices, so another hash may
    be the same model: which it is cannot be told, and is a warning.

    Args:
        doubly: the base was doubly quantised.
        where: what the warning calls the place of `recorded`.
    """
    if recorded in (now.source, now.stored):
        return False
    if recorded.startswith(SOURCE) or now.exact or not doubly:
        return True
    log.warning(
        "%s was written by an earlier version, whose hash of doubly quantised weights (%s, here %s) hangs on the number of threads and the kind "
        "of GPU: the same model may have another one. Whether the weights of model.backbone.name are those of the training cannot be told; "
        "see that they are. Checkpoints from now on hold a hash that tells",
        where,
        recorded,
        now.stored,
    )
    return False


def check_fit(
    state: CheckpointState,
    expected: RunIdentity,
    checkpoint: Path,
    *,
    force: bool = False,
    base: BaseFingerprint | None = None,
) -> None:
    """Refuse to continue `checkpoint` in a run that differs from it in any of `expected`; `base` has the older fingerprint too.

    Another number of ranks fits always. A setting that the checkpoint's version did not have counts as the schema's default;
    one that this version does not have is left out where its value says that it was not used (:data:`trainer.saved_config.OFF`).
    With `force`, other settings and other data are a warning; another base or ZeRO stage never is.

    Raises:
        CheckpointError: every difference, and what to do.
    """
    differing = {key: getattr(state, key) != getattr(expected, key) for key in ("tasks", "base", "zero")}
    if base is not None:
        differing["base"] = is_other_base(state, base, checkpoint)
    faults = [
        f"  {key}: the checkpoint has {getattr(state, key)!r}, this run {getattr(expected, key)!r}"
        for key, differs in differing.items()
        if differs
    ]
    forced = _setting_differences(state, expected, checkpoint)
    if state.data != expected.data:
        forced.append(f"  data: the checkpoint has {state.data!r}, this run {expected.data!r}")
    if force and forced and not faults:
        log.warning("--force: %s is continued although this run differs:\n%s", checkpoint.name, "\n".join(forced))
        return
    if faults or forced:
        cure = "continue it under the same settings" + ("" if faults else ", or all the same with --force")
        lines = [f"{checkpoint} was written by another run:", *faults, *forced, f"{cure}, or {ANEW}"]
        raise CheckpointError("\n".join(lines))


def _setting_differences(state: CheckpointState, expected: RunIdentity, checkpoint: Path) -> list[str]:
    saved, unknown = completed_settings(state.settings)
    now: dict[str, Any] = expected.model_dump()["settings"]  # as a checkpoint would hold them
    lines = [
        f"  {name}: the checkpoint has {saved.get(name)!r}, this run {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    unused = [name for name, value in unknown.items() if value in OFF]
    if unused:
        log.info(
            "%s: not used, and not in this version of egmf-trainer: %s", checkpoint.name, ", ".join(sorted(unused))
        )
    used = sorted(set(unknown) - set(unused))
    writer = f" ({state.version} wrote it)" if state.version else ""
    lines += [f"  {n}: the checkpoint has {unknown[n]!r}, and this version has no such setting{writer}" for n in used]
    return lines
