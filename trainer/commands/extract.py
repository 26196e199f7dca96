"""Clips to own data: extract, and the options of clips that other commands have too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import Json, option_groups
from trainer.commands.output import print_json, progress_bar, say, wide

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.features.extract import Extraction, Report
    from trainer.features.manifest import Manifest

app = typer.Typer()
SECONDS = 600.0  # trainer.features.extract.TIME_LIMIT, which `egmf --help` does not import
SHOWN = 20  # rows that were left out, in what is printed

RecipeName = Annotated[
    str, typer.Option("--recipe", help="a recipe's YAML file, or a name of egmf config list", metavar="RECIPE")
]


@dataclass(frozen=True)
class ClipOptions:
    """How clips are extracted."""

    device: Annotated[
        str, typer.Option(help="of the recipe's encoders: auto, cpu, cuda or cuda:N", metavar="DEVICE")
    ] = "auto"
    time_limit: Annotated[
        float, typer.Option(help="seconds for one clip; one that takes longer is left out", metavar="S")
    ] = SECONDS


DEFAULT_CLIPS = ClipOptions()


@app.command()
@option_groups
def extract(
    manifest: Annotated[
        Path, typer.Argument(help="JSON lines or CSV: clip, start, end, and the keys of own data", metavar="MANIFEST")
    ],
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="where own data and arrays go; goes on where it stopped", metavar="DIR")],
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    shard: Annotated[
        str, typer.Option(help="extract part I of N; the last to end writes samples.jsonl", metavar="I/N")
    ] = "1/1",
    clips: ClipOptions = DEFAULT_CLIPS,
    force: Annotated[bool, typer.Option("--force", help="replace what another recipe extracted into DIR")] = False,
    as_json: Json = False,
) -> int:
    """Extract the features of clips by one recipe, as own data that egmf prepare reads.

    A clip that cannot be read is left out and told; the exit code is then 1. The same command continues after an interruption.
    """
    part = _shard(shard)
    found = run_extraction(noted_manifest(manifest), recipe, out, workers, clips, shard=part, force=force)
    if as_json:
        print_json({**found.report, "complete": found.complete, "extracted": found.extracted, "out": str(found.out)})
    else:
        wide().print(report_table(found.report))
        tell(found)
    return 1 if found.report["left_out"] else 0


def noted_manifest(path: Path) -> Manifest:
    """A manifest; what the user should see of it is said.

    Raises:
        ManifestError: every fault, with its line.
    """
    from trainer.features.manifest import read_manifest

    manifest = read_manifest(path)
    for note in manifest.notes:
        say(f"note: {note}")
    return manifest


def run_extraction(
    manifest: Manifest,
    recipe: str,
    out: Path,
    workers: int,
    clips: ClipOptions,
    *,
    shard: tuple[int, int] = (1, 1),
    force: bool = False,
) -> Extraction:
    """See :func:`trainer.features.extract.extract`; with a progress bar."""
    from trainer.features.extract import extract as extract_clips
    from trainer.features.recipe import read_recipe

    read = read_recipe(recipe)
    with _clips_bar() as progress:
        return extract_clips(
            manifest,
            read,
            out,
            workers=workers,
            shard=shard,
            device=clips.device,
            time_limit=clips.time_limit,
            force=force,
            progress=progress,
        )


def tell(found: Extraction) -> None:
    """What was left out, and whether all is there."""
    from trainer.features.extraction_folder import REPORT_TEXT, SAMPLES

    left = found.report["left_out"]
    for one in left[:SHOWN]:
        say(f"line {one['line']}: left out: {one['kind']}: {one['why']}")
    if len(left) > SHOWN:
        say(f"… and {len(left) - SHOWN} more" + (f", see {found.out / REPORT_TEXT}" if found.complete else ""))
    if found.complete:
        say(f"written: {found.out / SAMPLES}")
    else:
        say(f"this part is done; {SAMPLES} is written by the part that ends last")


def report_table(report: Report) -> Table:
    """An extraction as one table."""
    from rich.table import Table

    table = Table(f"recipe {report['recipe'][:16]}", "clips")
    table.columns[1].justify = "right"
    table.add_row("rows", str(report["rows"]))
    table.add_row("left out", str(len(report["left_out"])), end_section=True)
    for modality, n in report["modalities"].items():
        table.add_row(f"with {modality}", str(n))
    table.add_row("minutes", f"{report['seconds'] / 60:.1f}", end_section=True)
    for kind, modalities in sorted(report["notes"].items()):
        for modality, n in sorted(modalities.items()):
            table.add_row(f"{kind} ({modality})", str(n))
    return table


def _shard(given: str) -> tuple[int, int]:
    first, slash, second = given.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard is I/N, part I (from 1 to N) of N, not {given!r}")
    return int(first), int(second)


@contextlib.contextmanager
def _clips_bar() -> Iterator[Callable[[int, int], None]]:
    with progress_bar() as bar:
        row = bar.add_task("clips", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)

        yield progress
