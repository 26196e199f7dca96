"""Comparing runs: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.commands.shared import Json, print_json, say, wide

app = typer.Typer()


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(help="run folders, folders of runs, MLflow run ids, experiment names", metavar="WHAT..."),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="test differences of this metric (may be repeated; all); default: the task's"),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="settings by which runs are grouped; default: all that differ", metavar="KEY[,KEY]"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="compare on this task only")] = None,
    baseline: Annotated[str | None, typer.Option(help="compare all groups with this one", metavar="GROUP")] = None,
    split: Annotated[Literal["test", "valid", "train"], typer.Option(help="whose predictions are compared")] = "test",
    sort_by: Annotated[
        str | None, typer.Option(help="sort groups by a metric on validation (never on test)", metavar="METRIC")
    ] = None,
    kinds: Annotated[bool, typer.Option("--kinds", help="also by kind of sample, where the data has kinds")] = False,
    correction: Annotated[Literal["holm", "bh", "none"], typer.Option(help="of p for many comparisons")] = "holm",
    level: Annotated[float, typer.Option(help="of intervals")] = 0.95,
    resamples: Annotated[int, typer.Option(help="of the samples, for intervals and p")] = 2000,
    uri: Annotated[
        str | None, typer.Option(help="MLflow store: sqlite:///FILE or http://HOST; default: beside the folders")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write compare.csv, .json, .tex and .html there", metavar="DIR")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="compare although data or tasks differ")] = False,
    as_json: Json = False,
) -> None:
    """Compare runs: mean and deviation over seeds, intervals, paired tests, cost, and what differs between the configs."""
    from trainer.results.compare import compare as compare_runs
    from trainer.results.compare_output import as_json as plain
    from trainer.results.compare_output import terminal
    from trainer.results.run_sources import find_runs

    found = find_runs(what, {split, *(["valid"] if sort_by else [])}, uri)
    for note in found.notes:
        say(f"warning: {note}")
    comparison = compare_runs(
        found.runs,
        split=split,
        metrics=metric or (),
        task=task,
        group_by=group_by.split(",") if group_by else (),
        baseline=baseline,
        kinds=kinds,
        sort_by=sort_by,
        correction=correction,
        level=level,
        resamples=resamples,
        force=force,
    )
    comparison.notes[:0] = found.notes
    if as_json:
        print_json(plain(comparison))
    else:
        wide().print(terminal(comparison))
