"""The config of a run that was trained, by this version or another."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trainer.config import RunConfig, check_config, flatten, is_text_setting
from trainer.config_files import ConfigError, Layer, merge, parse_overrides, read_plain
from trainer.files import load_json
from trainer.schema import defaults_of_missing, dotted, nest

log = logging.getLogger(__name__)

# values of a setting that mean that it is not used
OFF: Final[tuple[Any, ...]] = (None, False, 0, "", "none", "auto", [], {})
# what versions without a setting did, where it is not the default of today
BEFORE: Final[dict[str, Any]] = {"eval.score": "full"}


def unsaid(saved: Iterable[str]) -> dict[str, Any]:
    """The settings that a run was saved without, since its version did not have them: dotted key -> what that version did, which is the
    default where nothing else is known."""
    return defaults_of_missing(saved, flatten(RunConfig(task="any")) | BEFORE)


def saved_config(run: Path, overrides: Sequence[str] = (), data: str | None = None) -> RunConfig:
    """The config a run was trained with, by this version or another: what it does not say is as :func:`unsaid` has it.

    A setting that this version does not have is left out where its value says that it is not used (:data:`OFF`).

    Raises:
        ValueError: `run` is not a run folder, or uses a setting that this version does not have.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml (egmf train writes one)")
    path_of_data = [] if data is None else ["data.path=" + data.replace("${", r"\${")]
    over = parse_overrides([*overrides, *path_of_data], is_text_setting)
    return completed_config(dotted(read_plain(path)), over, str(path), _version_of(run))


def completed_config(written: Mapping[str, Any], over: Layer, where: str, version: str = "") -> RunConfig:
    """The config whose settings, dotted key -> value, some version wrote out in the place `where`; see :func:`saved_config`.

    Args:
        over: what replaces them.
        version: of the writer, in brackets behind a space; empty where it is not known.

    Raises:
        ConfigError: it uses a setting that this version does not have, or is no config.
    """
    kept, unknown = nest(RunConfig, {**written, **defaults_of_missing(written, BEFORE)})
    used = {key: value for key, value in unknown.items() if value not in OFF}
    if used:
        names = ", ".join(f"{key}={value!r}" for key, value in used.items())
        raise ConfigError(
            f"{where} has settings that this version of egmf-trainer does not have: {names}; use the version that wrote it"
            f"{version}, or take them out of the file to leave them out"
        )
    if unknown:
        log.info("%s: not used and left out, since this version does not have them: %s", where, ", ".join(unknown))
    return check_config(merge(kept, over, where), where=where)


def as_begun(config: RunConfig, run: Path) -> RunConfig:
    """`config` as it continues the run in the folder `run`: the settings of :data:`BEFORE` that it does not name itself stay those
    that the run was begun with."""
    written = dotted(read_plain(run / "config.yaml")) if (run / "config.yaml").is_file() else {}
    for key, before in BEFORE.items():
        section, _, name = key.partition(".")
        holder, value = getattr(config, section), written.get(key, before)
        if written and name not in holder.model_fields_set and getattr(holder, name) != value:
            log.warning("%s=%s: the run was begun so, and is continued so unless the config names another", key, value)
            config = config.model_copy(update={section: holder.model_copy(update={name: value})})
    return config


def _version_of(run: Path) -> str:
    """The version that a run folder's record names, in brackets; empty where it names none."""
    try:
        return f" ({load_json((run / 'run.json').read_text(encoding='utf-8'))['versions']['egmf-trainer']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
