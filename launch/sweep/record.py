"""``sweep.json``: the plan of a sweep, by which the same command continues it and another one is refused."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, TypedDict, cast

from launch.sweep.sweep import Sweep, SweepPlan
from trainer.config import RunConfig, flatten
from trainer.files import load_json, write_json


class ParentRecord(TypedDict):
    """The MLflow run that stands above the sweep's runs."""

    uri: str
    run_id: str


class _Written(SweepPlan):
    version: int
    key: str  # by which the parent run is found again where its id was not written
    mlflow: ParentRecord | None


class SweepRecord(_Written, total=False):
    """What ``sweep.json`` holds; `slurm` is the id of the job that was submitted last."""

    slurm: str


def open_record(sweep: Sweep) -> SweepRecord:
    """The sweep's record, from its folder or begun anew; not written yet.

    Raises:
        ValueError: the folder holds another sweep; the message says what differs.
    """
    plan = sweep.plan()
    if not sweep.record.is_file():
        return cast(SweepRecord, {"version": 1, "key": uuid.uuid4().hex, "mlflow": None, **plan})
    try:
        record: SweepRecord = load_json(sweep.record.read_text(encoding="utf-8"))
        differing = _differences(record, plan)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{sweep.record} is damaged ({error}): move it away, the finished runs stay") from error
    if differing:
        lines = "\n".join(f"  {line}" for line in differing)
        raise ValueError(f"{sweep.folder} holds another sweep; choose another --out, or ask for the same:\n{lines}")
    return record


def write_record(sweep: Sweep, record: SweepRecord) -> None:
    """``sweep.json``, whole or not at all."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.record, record)


def _differences(record: SweepRecord, plan: SweepPlan) -> list[str]:
    """What is asked for now (`plan`) against what the folder holds."""
    lines = []
    if record["seeds"] != plan["seeds"]:
        lines.append(f"seeds: there {_joined(record['seeds'])}, now {_joined(plan['seeds'])}")
    old_folds, new_folds = (", ".join(values.get("folds", [])) or "none" for values in (record, plan))
    if old_folds != new_folds:
        lines.append(f"folds: there {old_folds}, now {new_folds}")
    there, now = list(record["variants"]), list(plan["variants"])
    if there != now:
        lines.append(f"variants: there {'; '.join(there)}, now {'; '.join(now)}")
    defaults: dict[str, Any] = flatten(RunConfig(task="meld"))  # for keys that the version that wrote it did not know
    for name in (n for n in there if n in plan["variants"]):
        old = {**record["base"], **record["variants"][name]}
        new = {**plan["base"], **plan["variants"][name]}
        for key in dict.fromkeys([*old, *new]):
            before, after = (values.get(key, defaults.get(key)) for values in (old, new))
            if before != after and key != "data.path":  # the fingerprint shows whether the data differ
                lines.append(f"{key}: there {before!r}, now {after!r}")
    return list(dict.fromkeys(lines))


def _joined(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds))
