"""Suites: named sets of variants of a run, each over seeds, and the comparisons made between them. Written as YAML (configs/suites)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from launch.sweep.grid import check_distinct, load_variant
from trainer.config import RunConfig
from trainer.config_files import read_mapping
from trainer.shipped import list_suites


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Generate(Strict):
    """Data that are generated before the runs: a diagnostic task, or the stand-in of a benchmark's."""

    task: Literal["diagnostic", "diagnostic-regression", "meld", "cherma", "mosei", "mosi", "simsv2"]
    seed: int = 0
    sizes: dict[str, int] = Field(default_factory=dict)


class EvidenceClaim(Strict):
    """Of a kind of samples: the expert it is made for, and the variant that lacks this expert."""

    expert: str
    without: str


class Published(Strict):
    """A value to be compared with, as a fraction; `as` is what the source calls the metric."""

    metric: str
    value: float
    called: str = Field(alias="as")


class SingleTask(Strict):
    """Of a task: the variant that trains it alone, and the metric to compare."""

    variant: str
    metric: str


class JointTraining(Strict):
    """The variant that trains all tasks at once, and by how much it may be worse than each task alone."""

    variant: str
    alone: dict[str, SingleTask] = Field(min_length=1)
    loses: float = Field(ge=0)


class Suite(Strict):
    """`variants`: name -> dotted key -> value, over `config` (or the variant's own of `configs`)."""

    title: str
    config: Path | None = None
    configs: dict[str, Path] = Field(default_factory=dict)
    generate: tuple[Generate, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    baseline: str | None = None
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    evidence: dict[str, EvidenceClaim] = Field(default_factory=dict)
    published: dict[str, Published] = Field(default_factory=dict)
    together: JointTraining | None = None
    minutes: float | None = Field(None, gt=0, description="of one run, measured; where and when stands beside it")

    @model_validator(mode="after")
    def _names(self) -> Suite:
        named = {
            "baseline": [self.baseline] if self.baseline else [],
            "configs": self.configs,
            "published": self.published,
        }
        if self.together is not None:
            named["together"] = [self.together.variant, *(one.variant for one in self.together.alone.values())]
        named["evidence"] = [one.without for one in self.evidence.values()]
        faults = [
            f"{key}: no variant {name}" for key, names in named.items() for name in names if name not in self.variants
        ]
        faults += [
            f"{name} has no config" for name in self.variants if self.config is None and name not in self.configs
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def configurations(self, overrides: Sequence[str]) -> dict[str, RunConfig]:
        """Variant -> config; `overrides` come under what makes the variant.

        Raises:
            ValueError: every fault of every variant, in one message.
        """
        found, faults = {}, []
        for name, values in self.variants.items():
            path = self.configs.get(name, self.config)
            assert path is not None
            own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
            try:
                found[name] = load_variant(path, [*overrides, *own])
            except ValueError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise ValueError("\n".join(faults))
        check_distinct(found)
        return found


def load_suite(name: str) -> Suite:
    """A suite by its name among the shipped ones, or by its file.

    Raises:
        ValueError: there is none, or it cannot be used; every fault in one message.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        shipped = {suite.name: suite.path for suite in list_suites()}
        if name not in shipped:
            raise ValueError(f"no suite {name}; there are: {', '.join(shipped)}; or name a YAML file")
        path = shipped[name]
    raw = _read(path)
    try:
        return Suite.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ValueError("\n".join([f"{path} is not a valid suite:", *lines])) from error


def _read(path: Path) -> Mapping[str, Any]:
    """The file over what it extends; paths are those of the file they stand in."""
    node = read_mapping(path, "a mapping, with 'variants' and 'seeds'")
    base = node.pop("extends", None)
    own = OmegaConf.to_container(node)
    assert isinstance(own, dict)
    if "config" in own:
        own["config"] = str((path.parent / own["config"]).resolve())
    if "configs" in own:
        own["configs"] = {key: str((path.parent / value).resolve()) for key, value in own["configs"].items()}
    if base is None:
        return {str(key): value for key, value in own.items()}
    under = _read(path.parent / str(base))
    together = {
        key: {**under[key], **own[key]} for key in ("variants", "configs", "published") if key in own and key in under
    }
    return {**under, **{str(key): value for key, value in own.items()}, **together}
