"""A sweep: the runs that it consists of, each in a folder ``<values>,fold=<fold>-s<seed>`` of its own, and which of them are done."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from launch.start.local import run_state
from launch.sweep.grid import planned_settings
from trainer.checkpoint.identity import training_settings
from trainer.config import RunConfig, dump_config
from trainer.data.folds import fold_labels
from trainer.files import load_json, write_text
from trainer.questions import tasks_of_run
from trainer.saved_config import saved_config
from trainer.tracking.outbox import tracking_uri

RECORD = "sweep.json"
CONFIG = "sweep.yaml"  # in a run folder: the config as the sweep asks for it


class _Plan(TypedDict):
    seeds: list[int]
    base: dict[str, Any]  # dotted key -> value
    variants: dict[str, dict[str, Any]]


class SweepPlan(_Plan, total=False):
    """What is written down of a sweep: the settings that all variants share, those in which each differs, the seeds, the folds."""

    folds: list[str]  # of a cross-validation


@dataclass(frozen=True)
class Child:
    """One run of a sweep."""

    name: str
    variant: str
    config: RunConfig
    out: Path
    fold: str | None = None

    @property
    def file(self) -> Path:
        """Where its config is written."""
        return self.out / CONFIG


@dataclass(frozen=True)
class Sweep:
    """`variants` (name -> config of any seed) times `seeds`, and times `folds` where there are some, in `folder`."""

    folder: Path
    variants: Mapping[str, RunConfig]
    seeds: tuple[int, ...]
    folds: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        return self.folder / RECORD

    def plan(self) -> SweepPlan:
        """What decides whether another command asks for the same sweep."""
        flat = {name: planned_settings(config) for name, config in self.variants.items()}
        first = next(iter(flat.values()))
        base = {key: value for key, value in first.items() if all(key in v and v[key] == value for v in flat.values())}
        variants = {name: {k: v for k, v in values.items() if k not in base} for name, values in flat.items()}
        plan: SweepPlan = {"seeds": list(self.seeds), "base": base, "variants": variants}
        if self.folds:
            plan["folds"] = list(self.folds)
        return plan

    def children(self, parent: str | None = None) -> list[Child]:
        """All runs, seed by seed and fold by fold, so that an interrupted sweep has something to say of every variant.

        `parent` is the id of the MLflow run that they belong to. All are recorded in one store, beside the sweep's folder.
        """
        children = []
        labels = fold_labels(self.folds)
        for seed, (fold, label), (variant, config) in itertools.product(
            self.seeds, labels.items() or [(None, "")], self.variants.items()
        ):
            settings = ",".join(filter(None, (variant, label)))
            name = f"{settings}-s{seed}" if settings else f"s{seed}"
            own = config.model_copy(deep=True)
            own.train.seed = seed
            if fold is not None:
                own.data.fold = fold
            own.track.uri = tracking_uri(config.track, self.folder)
            own.track.run_name = config.track.run_name or f"{self.folder.absolute().name}/{name}"
            own.track.tags = {
                **config.track.tags,
                "egmf.sweep": self.folder.absolute().name,
                **({"egmf.variant": variant} if variant else {}),
                **({"mlflow.parentRunId": parent} if parent else {}),
            }
            children.append(Child(name, variant, own, self.folder / name, fold))
        return children


def finished(children: Sequence[Child]) -> set[str]:
    """The names of those that are done by their own record.

    Raises:
        ValueError: some are done, but are not what the sweep asks for; all of them in one message.
    """
    done, faults = set(), []
    for child in children:
        if run_state(child.out).state != "done":
            continue
        asked, saved = training_settings(child.config), training_settings(saved_config(child.out))
        differing = sorted(key for key in {*asked, *saved} if asked.get(key) != saved.get(key))
        trained = load_json((child.out / "run.json").read_text(encoding="utf-8"))["data"]
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


def _fingerprints(config: RunConfig) -> dict[str, str]:
    """Task -> fingerprint of its prepared dataset, where it is there."""
    from trainer.data.preparation.folder import read_record

    found = {}
    for one in tasks_of_run(config.tasks):
        record = read_record(Path(one.path(config.data.path)))
        if record is not None:
            found[one.task.name] = str(record["fingerprint"])
    return found
