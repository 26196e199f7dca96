"""One config over values and seeds: which runs that makes, what of them is done, and the rest made on this machine.

The folder of a sweep holds a run folder for each, ``<values>-s<seed>``, and ``sweep.json``: the plan, so that the same command
continues the sweep and another one is refused.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.start.local import run_state
from trainer.checkpoint.identity import effect_of, training_settings
from trainer.config import RunConfig, dump_config, flatten, load_config, saved_config
from trainer.files import write_json, write_text
from trainer.tasks import TaskError, get_task
from trainer.tracking.outbox import tracking_uri

RECORD = "sweep.json"
CONFIG = "sweep.yaml"  # in a run folder: the config as the sweep asks for it
LONGEST = 100  # characters of a run folder's name; longer ones are numbered instead


@dataclass(frozen=True)
class Child:
    """One run of a sweep."""

    name: str
    variant: str
    config: RunConfig
    out: Path

    @property
    def file(self) -> Path:
        """Where its config is written."""
        return self.out / CONFIG


@dataclass(frozen=True)
class Sweep:
    """`variants` (name -> config of any seed) times `seeds`, in `folder`."""

    folder: Path
    variants: Mapping[str, RunConfig]
    seeds: tuple[int, ...]

    @property
    def record(self) -> Path:
        return self.folder / RECORD

    def plan(self) -> dict[str, Any]:
        """What is written down: the settings that all variants share, those in which each differs, and the seeds."""
        flat = {name: _planned(config) for name, config in self.variants.items()}
        first = next(iter(flat.values()))
        base = {key: value for key, value in first.items() if all(key in v and v[key] == value for v in flat.values())}
        variants = {name: {k: v for k, v in values.items() if k not in base} for name, values in flat.items()}
        return {"seeds": list(self.seeds), "base": base, "variants": variants}

    def children(self, parent: str | None = None) -> list[Child]:
        """All runs, seed by seed, so that an interrupted sweep has something to say of every variant.

        `parent` is the id of the MLflow run that they belong to. All are recorded in one store, beside the sweep's folder.
        """
        children = []
        for seed, (variant, config) in itertools.product(self.seeds, self.variants.items()):
            name = f"{variant}-s{seed}" if variant else f"s{seed}"
            own = config.model_copy(deep=True)
            own.train.seed = seed
            own.track.uri = tracking_uri(config.track, self.folder)
            own.track.run_name = config.track.run_name or f"{self.folder.absolute().name}/{name}"
            own.track.tags = {
                **config.track.tags,
                "egmf.sweep": self.folder.absolute().name,
                **({"egmf.variant": variant} if variant else {}),
                **({"mlflow.parentRunId": parent} if parent else {}),
            }
            children.append(Child(name, variant, own, self.folder / name))
        return children


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
    faults = []
    for name in config.tasks:
        try:
            get_task(name)
        except TaskError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return config


def check_distinct(variants: Mapping[str, RunConfig]) -> None:
    """Refuse two names for one run.

    Raises:
        ValueError: with both names.
    """
    for (one, first), (two, second) in itertools.combinations(variants.items(), 2):
        if _planned(first) == _planned(second):
            raise ValueError(f"{one} and {two} are the same run: name each value once")


def parse_seeds(text: str, overrides: Sequence[str], option: str = "--seeds") -> tuple[int, ...]:
    """The seeds of an option: whole numbers with commas between them.

    Raises:
        ValueError: they are none, or a seed is named twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} {text}: must be whole numbers with commas between them, such as 1,2,3")
    if any(override.startswith("train.seed=") for override in overrides):
        raise ValueError(f"train.seed and {option} name the seed twice: leave train.seed out")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{option} {text}: names a seed twice")
    return seeds


def open_record(sweep: Sweep) -> dict[str, Any]:
    """The sweep's record, from its folder or begun anew; not written yet.

    Raises:
        ValueError: the folder holds another sweep; the message says what differs.
    """
    plan = sweep.plan()
    if not sweep.record.is_file():
        return {"version": 1, "key": uuid.uuid4().hex, "mlflow": None, **plan}
    try:
        record = json.loads(sweep.record.read_text(encoding="utf-8"))
        differing = _differences(record, plan)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{sweep.record} is damaged ({error}): move it away, the finished runs stay") from error
    if differing:
        lines = "\n".join(f"  {line}" for line in differing)
        raise ValueError(f"{sweep.folder} holds another sweep; choose another --out, or ask for the same:\n{lines}")
    return dict(record)


def finished(children: Sequence[Child]) -> set[str]:
    """The names of those that are done by their own record.

    Raises:
        ValueError: some are done, but are not what the sweep asks for; all of them in one message.
    """
    done, faults = set(), []
    for child in children:
        if run_state(child.out)[0] != "done":
            continue
        ours, theirs = training_settings(child.config), training_settings(saved_config(child.out))
        differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        trained = json.loads((child.out / "run.json").read_text(encoding="utf-8"))["data"]
        differing += [f"the data of {t}" for t, mark in _fingerprints(child.config).items() if trained.get(t) != mark]
        if differing:
            faults.append(f"{child.out} is done, but differs in {', '.join(differing)}: move it away to train it anew")
        done.add(child.name)
    if faults:
        raise ValueError("\n".join(faults))
    return done


def write_configs(children: Sequence[Child]) -> None:
    """Every run's config into its folder.

    Raises:
        ValueError: a folder cannot be written.
    """
    for child in children:
        try:
            child.out.mkdir(parents=True, exist_ok=True)
            write_text(child.file, dump_config(child.config))
        except OSError as error:
            raise ValueError(
                f"the run folder {child.out} cannot be written: {error.strerror}; choose another --out"
            ) from error


def write_record(sweep: Sweep, record: Mapping[str, Any]) -> None:
    """``sweep.json``, whole or not at all."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.record, record)


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
    names = [",".join(f"{short[key]}={_plain(value)}" for key, value in chosen.items()) for chosen in combinations]
    if len(set(names)) < len(names) or any(len(name) > LONGEST for name in names):
        return [f"v{number}" for number in range(1, len(names) + 1)]
    return names


def _plain(value: str) -> str:
    inner = value.strip("[]{}()'\" ")
    return re.sub(r"[^\w.+-]", "_", "+".join(part.strip(" '\"") for part in inner.split(",")))


def _planned(config: RunConfig) -> dict[str, Any]:
    """What a sweep's plan holds of a config: all but the seed, what may change at any time, and where it is recorded."""
    flat = {k: v for k, v in flatten(config).items() if _is_planned(k)}
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()
    }  # as JSON holds them


def _is_planned(key: str) -> bool:
    if key == "data.path" or key.startswith("eval."):
        return True
    return key != "train.seed" and effect_of(key) == "training"


def _differences(record: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """What is asked for now (`plan`) against what the folder holds."""
    lines = []
    if record["seeds"] != plan["seeds"]:
        lines.append(f"seeds: there {_shown(record['seeds'])}, now {_shown(plan['seeds'])}")
    there, now = list(record["variants"]), list(plan["variants"])
    if there != now:
        lines.append(f"variants: there {'; '.join(there)}, now {'; '.join(now)}")
    usual = flatten(RunConfig(task="meld"))  # a version of ours may know more keys than the one that wrote the record
    for name in (n for n in there if n in plan["variants"]):
        old = {**record["base"], **record["variants"][name]}
        new = {**plan["base"], **plan["variants"][name]}
        for key in dict.fromkeys([*old, *new]):
            before, after = (values.get(key, usual.get(key)) for values in (old, new))
            if before != after and key != "data.path":  # the fingerprint tells whether data are others
                lines.append(f"{key}: there {before!r}, now {after!r}")
    return list(dict.fromkeys(lines))


def _shown(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds))


def _fingerprints(config: RunConfig) -> dict[str, str]:
    """Task -> fingerprint of its prepared dataset, where it is there."""
    from trainer.data.folder import read_record

    found = {}
    for name in config.tasks:
        task = get_task(name).name
        record = read_record(Path(config.data.path.replace("{task}", task)))
        if record is not None:
            found[task] = str(record["fingerprint"])
    return found
