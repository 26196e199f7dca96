"""From raw samples to a checked, fingerprinted, memory-mapped dataset on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.data.readers import Source
from trainer.tasks import Task

DropBad = Literal["none", "train", "all"]
Progress = Callable[[str, int, "int | None"], None]


@dataclass
class Summary:
    """What a preparation made: the folder, its record, and whether the folder held the same dataset already."""

    path: Path
    record: dict[str, Any]
    unchanged: bool = False

    @property
    def fingerprint(self) -> str:
        return str(self.record["fingerprint"])


def prepare(
    task: Task,
    paths: Sequence[Path],
    out: Path,
    *,
    strict: bool = False,
    drop_bad: DropBad = "none",
    workers: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Open the published files at `paths` and prepare them; see :func:`prepare_source`."""
    raise NotImplementedError


def prepare_source(
    task: Task,
    source: Source,
    out: Path,
    *,
    strict: bool = False,
    drop_bad: DropBad = "none",
    workers: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Check `source` and write it to `out` as an Arrow dataset with `record.json`."""
    raise NotImplementedError
