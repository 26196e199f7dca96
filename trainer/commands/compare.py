"""Comparing runs: compare."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trainer.commands.options import Json
from trainer.commands.output import print_json, say, wide

if TYPE_CHECKING:
    from trainer.results.compare.files import Store
    from trainer.results.compare.result import Comparison
    from trainer.serving.mlflow_model.promotion import Promotion, Target

app = typer.Typer()


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            help="folders of runs or baselines, folders that contain some, MLflow run ids, experiment names",
            metavar="WHAT...",
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="metric whose differences are tested (repeatable, or all); default: the metric that the runs select by"
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="settings by which runs are grouped; default: all that differ", metavar="KEY[,KEY]"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="compare on this task only")] = None,
    baseline: Annotated[str | None, typer.Option(help="compare all groups with this one", metavar="GROUP")] = None,
    split: Annotated[
        Literal["test", "valid", "train"] | None,
        typer.Option(help="split whose predictions are compared; default: test, with --promote valid"),
    ] = None,
    sort_by: Annotated[
        str | None, typer.Option(help="sort groups by a metric on validation (never on test)", metavar="METRIC")
    ] = None,
    kinds: Annotated[bool, typer.Option("--kinds", help="also by kind of sample, where the data has kinds")] = False,
    correction: Annotated[
        Literal["holm", "bh", "none"], typer.Option(help="of p-values for multiple comparisons")
    ] = "holm",
    level: Annotated[float, typer.Option(help="confidence level of intervals")] = 0.95,
    resamples: Annotated[int, typer.Option(help="bootstrap resamples, for intervals and p-values")] = 2000,
    uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow store of runs and experiments that are named: sqlite:///FILE or http://HOST; default: "
            "MLFLOW_TRACKING_URI, else mlflow.db beside the folders"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write compare.csv, .json, .tex and .html there", metavar="DIR")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="compare even if data or tasks differ")] = False,
    log: Annotated[bool, typer.Option("--log/--no-log", help="log the files to your own MLflow store")] = True,
    log_to: Annotated[
        str | None,
        typer.Option(
            help="the store to log to; default: --uri, else MLFLOW_TRACKING_URI, else mlflow.db beside the folders; never one "
            "that runs name",
            metavar="URI",
        ),
    ] = None,
    promote: Annotated[
        str | None,
        typer.Option(
            help="give this alias of a registered model to the version of the group that is better with significance on "
            "validation; refused where none is (docs/mlflow.md)",
            metavar="NAME@ALIAS",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: mean and deviation over seeds and folds, intervals, paired tests, cost, and settings that differ."""
    from trainer.results.compare.comparison import compare as compare_runs
    from trainer.results.compare.sources.find import find_runs

    target = _promotion_target(promote, split, force=force, correction=correction, kinds=kinds)
    split = split or ("test" if target is None else "valid")
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
    folders = [Path(word) for word in what if Path(word).is_dir()]
    _tell(comparison, target, log_to or uri, folders, out, log=log, as_json=as_json)


def _tell(
    comparison: Comparison,
    target: Target | None,
    uri: str | None,
    folders: Sequence[Path],
    out: Path | None,
    *,
    log: bool,
    as_json: bool,
) -> None:
    """Print the comparison, keep its files, and promote what it shows to be better, or refuse to.

    Raises:
        ValueError: a promotion was asked for, and is refused.
    """
    from trainer.results.compare.files import store_for
    from trainer.results.compare.output import as_json as comparison_json
    from trainer.results.compare.output import terminal

    store = store_for(comparison, uri, folders) if log else None
    for note in comparison.notes:
        if note.startswith("WARNING: "):
            say(note)
    outcome = None if target is None else _promoted(comparison, target, uri, folders)
    if as_json:
        print_json({**comparison_json(comparison), **({} if outcome is None else {"promotion": _plain(outcome)})})
    else:
        wide().print(terminal(comparison))
    _keep(comparison, out, store)
    if isinstance(outcome, ValueError):
        raise outcome
    for line in outcome.lines if outcome else []:
        say(line)


def _keep(comparison: Comparison, out: Path | None, store: Store | None) -> None:
    """Write the files and log them. A failure to log is only a warning, since the comparison itself is done."""
    from trainer.results.compare.files import NAME, log_comparison, write_comparison

    with tempfile.TemporaryDirectory(prefix="egmf-compare-") as scratch:
        if out is not None or store is not None:
            files = write_comparison(comparison, out or Path(scratch))
        if out is not None:
            say(f"written: {', '.join(path.name for path in files)} in {out}")
        if store is not None:
            try:
                run_id = log_comparison(comparison, files, store)
                say(f"logged to MLflow at {store.uri}: run {run_id} ({NAME}) of the experiment {store.experiment}")
            except ValueError as error:
                say(f"warning: {error}; --no-log turns logging off")


def _promotion_target(
    promote: str | None, split: str | None, *, force: bool, correction: str, kinds: bool
) -> Target | None:
    """What ``--promote`` names, checked against the other options before anything is read."""
    if promote is None:
        return None
    from trainer.serving.mlflow_model.promotion import check_request

    return check_request(promote, split=split, force=force, correction=correction, kinds=kinds)


def _promoted(
    comparison: Comparison, target: Target, uri: str | None, folders: Sequence[Path]
) -> Promotion | ValueError:
    """The promotion, or why there is none, which is told after the comparison's tables."""
    from trainer.serving.mlflow_model.promotion import promote
    from trainer.serving.mlflow_model.store import registry_uri

    try:
        return promote(comparison, target, registry_uri(uri, folders))
    except ValueError as error:
        return error


def _plain(outcome: Promotion | ValueError) -> dict[str, Any]:
    return {"refused": str(outcome)} if isinstance(outcome, ValueError) else outcome.plain()
