"""What a preparation is asked for, as far as it can be refused before a source is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from trainer.data.preparation.faults import DataError
from trainer.data.preparation.feature_statistics import Standardise
from trainer.data.preparation.folder import check_free, read_record
from trainer.data.preparation.frames import ZeroFrames
from trainer.data.preparation.resampling import check_max_rate
from trainer.questions import Definition

DropBad = Literal["none", "train", "all"]


def check_arguments(
    task: Definition,
    out: Path,
    strict: bool,
    drop_bad: DropBad,
    zero_frames: ZeroFrames,
    standardise: Standardise,
    max_rate: float | None,
    workers: int,
    force: bool,
) -> None:
    """Everything that can be refused before the source is read.

    Raises:
        DataError: arguments that do not go together, or an `out` that is taken.
    """
    if standardise not in get_args(Standardise):
        raise DataError(f"standardise is one of {', '.join(get_args(Standardise))}, not {standardise!r}")
    if drop_bad not in get_args(DropBad):
        raise DataError(f"drop_bad is one of {', '.join(get_args(DropBad))}, not {drop_bad!r}")
    if strict and drop_bad != "none":
        raise DataError("strict refuses every faulty sample and drop_bad leaves them out: give one of them")
    if zero_frames not in get_args(ZeroFrames):
        raise DataError(f"zero_frames is one of {', '.join(get_args(ZeroFrames))}, not {zero_frames!r}")
    check_max_rate(max_rate)
    if workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")
    check_free(out)
    there = read_record(out)
    if there is not None and not force:
        mode = there.get("dropped", {}).get("mode", "none")
        if there["task"] != task.model_dump(mode="json"):
            other = there["task"].get("name")
            what = f"task {other}" if other != task.name else f"another definition of task {other}"
            raise DataError(f"{out} holds a dataset of {what}: choose another --out, or replace it with --force")
        if mode != drop_bad:
            raise DataError(
                f"{out} was prepared with drop_bad={mode}, not {drop_bad}: choose another --out, or replace it with --force"
            )
        measured = (
            there["standardisation"]["mode"] if "standardisation" in there else standardise
        )  # absent: earlier version
        if measured != standardise:
            raise DataError(
                f"{out} was prepared with standardise={measured}, not {standardise}: choose another --out, or replace it with "
                "--force"
            )
        if there.get("max_rate") != max_rate:
            before, now = (
                f"max_rate={rate:g}" if rate is not None else "no max_rate"
                for rate in (there.get("max_rate"), max_rate)
            )
            raise DataError(
                f"{out} was prepared with {before}, not {now}: choose another --out, or replace it with --force"
            )
