"""Which runs an option line asks for: every combination of the values of ``--set``, and the seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.identity import effect_of
from trainer.config import RunConfig, flatten, load_config
from trainer.files import plain
from trainer.questions import get_tasks

LONGEST = 100  # characters of a run folder's name; longer ones are numbered instead


def expand(path: Path, overrides: Sequence[str], values: Sequence[str]) -> dict[str, RunConfig]:
    """Name -> config for every combination of the `values` (``key=v1,v2``); one without a name where there are none.

    Raises:
        ValueError: every fault of every combination, in one message.
    """
    swept, faults = _parse(values, overrides)
    if faults:
        raise ValueError("\n".join(faults))
    combinations = [dict(zip(swept, chosen, strict=True)) for chosen in itertools.product(*swept.values())]
    found: dict[str, RunConfig] = {}
    for name, chosen in zip(_names(combinations), combinations, strict=True):
        try:
            found[name] = load_variant(path, [*overrides, *(f"{key}={value}" for key, value in chosen.items())])
        except ValueError as error:
            faults.append(f"{name}: {error}" if name else str(error))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    check_distinct(found)
    return found


def load_variant(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The config of a variant, its tasks known.

    Raises:
        ValueError: all its faults.
    """
    config = load_config(path, overrides)
    get_tasks(config.tasks, config.eval.select)
    return config


def check_distinct(variants: Mapping[str, RunConfig]) -> None:
    """Refuse two names for one run.

    Raises:
        ValueError: with both names.
    """
    for (one, first), (two, second) in itertools.combinations(variants.items(), 2):
        if planned_settings(first) == planned_settings(second):
            raise ValueError(f"{one} and {two} are the same run: give each value once")


def planned_settings(config: RunConfig) -> dict[str, Any]:
    """What a sweep's plan holds of a config: all but the seed, what may change at any time, and where it is recorded."""
    flat = {k: v for k, v in flatten(config).items() if _is_planned(k)}
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()
    }  # as JSON holds them


def _is_planned(key: str) -> bool:
    if key == "data.path" or key.startswith("eval."):
        return True
    return key != "train.seed" and effect_of(key) == "training"


def parse_seeds(
    text: str, overrides: Sequence[str], option: str = "--seeds", *, allow_repeats: bool = False
) -> tuple[int, ...]:
    """The seeds of an option: whole numbers with commas between them.

    Args:
        allow_repeats: leave it to the caller to refuse a seed that is given twice.

    Raises:
        ValueError: they are none, or a seed is given twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} {text}: must be whole numbers with commas between them, such as 1,2,3")
    if any(override.startswith("train.seed=") for override in overrides):
        raise ValueError(f"train.seed and {option} name the seed twice: leave train.seed out")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds) and not allow_repeats:
        raise ValueError(f"{option} {text}: names a seed twice")
    return seeds


def split_values(text: str) -> list[str]:
    """Cut at the commas that stand in no brackets and no quotes: ``[a,b],[c]`` has two values."""
    parts, depth, quote, start = [], 0, "", 0
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]]]


def _parse(values: Sequence[str], overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Key -> values, and what is wrong with them."""
    swept: dict[str, list[str]] = {}
    faults = []
    fixed = {override.partition("=")[0] for override in overrides}
    for text in values:
        key, equals, rest = text.partition("=")
        parts = split_values(rest)
        if not equals or not key or not all(parts):
            faults.append(f"--set {text}: must be KEY=VALUE,VALUE, such as --set model.fusion.width=128,256")
        elif key == "train.seed":
            faults.append("--set train.seed: seeds are named by --seeds")
        elif key in swept or key in fixed:
            faults.append(f"--set {key}: the key is named twice")
        swept[key] = parts
    return swept, faults


def _names(combinations: Sequence[Mapping[str, str]]) -> list[str]:
    """A readable name for each: ``width=128,experts=local+global``; numbers where that is too long or not one to one."""
    keys = list(combinations[0])
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(keys):
        short = {key: ".".join(key.split(".")[-2:]) for key in keys}
    names = [",".join(f"{short[key]}={plain(value)}" for key, value in chosen.items()) for chosen in combinations]
    if len(set(names)) < len(names) or any(len(name) > LONGEST for name in names):
        return [f"v{number}" for number in range(1, len(names) + 1)]
    return names
