"""Trained models out of their run folders: export, push."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.options import Debug, DryRun, Json
from trainer.commands.output import print_json, say, wide

if TYPE_CHECKING:
    from trainer.serving.mlflow_model.registry import Registered

app = typer.Typer()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="the folder to be made", metavar="DIR")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="also write backbone and adapter as one model, in merged/")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="of the merged model: bf16, fp16 or fp32; default: that of training")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="replace an exported model; export a run that has not ended, or weights that look wrong"
        ),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="where the prepared datasets of the run are now, with {task} for several")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="where the backbone is now, a folder or a hub name", metavar="PATH")
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            help="log the model into the MLflow run that it came from, and register it there as a new version of NAME",
            metavar="NAME",
        ),
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="with --mlflow: the MLflow store; default: where the run was recorded")
    ] = None,
    requirement: Annotated[
        str | None,
        typer.Option(
            help="with --mlflow: from what pip installs egmf-trainer where the model is loaded; default: its code travels along",
            metavar="REQ",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write a trained run as a folder that answers without run and dataset, or register it in MLflow; no GPU is needed."""
    from trainer.serving.check import refuse_artefact

    refuse_artefact(run, "egmf export")
    _check_destinations(out, mlflow, uri, requirement, merge=merge)
    if dtype not in (None, "bf16", "fp16", "fp32"):
        raise ValueError(f"--dtype is bf16, fp16 or fp32, not {dtype!r}")

    from trainer.logs import set_up_logging
    from trainer.serving.artefact.export import ExportOptions, Precision, export_run

    set_up_logging(None, 0, debug=debug)
    precision: Precision | None = dtype  # type: ignore[assignment]  # one of these, as seen above
    options = ExportOptions(merge, precision, force, data, base)
    with tempfile.TemporaryDirectory(prefix="egmf-export-") as scratch:
        folder = out or Path(scratch) / "egmf"
        described = export_run(run, folder, options)
        total = sum(entry.bytes for entry in described.files.values())
        if out is not None:
            say(f"exported: {out} ({len(described.files)} files, {total / 2**20:,.1f} MiB, hash {described.hash[:16]})")
        version = None if mlflow is None else _register(run, folder, mlflow, uri, requirement)
    if as_json:
        told: dict[str, Any] = {} if out is None else {"path": str(out)}
        told |= {"hash": described.hash, "bytes": total, "files": sorted(described.files)}
        print_json(told if version is None else {**told, "mlflow": dataclasses.asdict(version)})
    return 0


def _check_destinations(
    out: Path | None, mlflow: str | None, uri: str | None, requirement: str | None, *, merge: bool
) -> None:
    """Refuse a model that would go nowhere, and options of a place that it does not go to."""
    if out is None and mlflow is None:
        raise ValueError("where does the model go? --out DIR writes a folder, --mlflow NAME registers a version")
    if mlflow is None and (uri is not None or requirement is not None):
        raise ValueError("--uri and --requirement are of --mlflow NAME, which is not given")
    if mlflow is not None and merge:
        raise ValueError(
            "--merge: a registry keeps the adapter alone; export once with --mlflow, and once with --out and --merge"
        )
    if mlflow is not None:
        from trainer.serving.mlflow_model.tags import check_name

        check_name(mlflow)


def _register(run: Path, folder: Path, name: str, uri: str | None, requirement: str | None) -> Registered:
    from trainer.serving.mlflow_model.registry import log_model

    return log_model(run, folder, name, uri=uri, requirement=requirement, report=say)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="a folder of egmf export", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="the hub's repository, OWNER/NAME", metavar="REPO")],
    dry_run: DryRun = False,
    private: Annotated[
        bool, typer.Option("--private", help="make the repository, where it is new, a private one")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="the branch; default: main")] = None,
    debug: Debug = False,
) -> int:
    """Upload an exported model to a hub, after all of its files were checked."""
    from trainer.logs import set_up_logging
    from trainer.serving.artefact.push import check_repo, list_files, push_artefact

    set_up_logging(None, 0, debug=debug)
    if dry_run:
        from rich.table import Table

        check_repo(repo)
        files = list_files(folder)
        table = Table("file", "bytes", title=f"would be uploaded to {repo}", title_justify="left")
        for name, size in files.items():
            table.add_row(name, f"{size:,}")
        wide().print(table)
        say(f"{len(files)} files, {sum(files.values()):,} bytes; nothing was uploaded")
        return 0
    say(f"pushed: {push_artefact(folder, repo, private=private, revision=revision)}")
    return 0
