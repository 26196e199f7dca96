"""Trained models out of their run folders: export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import Debug, DryRun, Json
from trainer.commands.output import print_json, say, wide

app = typer.Typer()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="the folder to be made", metavar="DIR")],
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
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write a trained run as a folder that answers without run and dataset; no GPU is needed."""
    from trainer.serving.check import refuse_artefact

    refuse_artefact(run, "egmf export")
    if dtype not in (None, "bf16", "fp16", "fp32"):
        raise ValueError(f"--dtype is bf16, fp16 or fp32, not {dtype!r}")

    from trainer.logs import set_up_logging
    from trainer.serving.artefact.export import ExportOptions, Precision, export_run

    set_up_logging(None, 0, debug=debug)
    precision: Precision | None = dtype  # type: ignore[assignment]  # one of these, as seen above
    described = export_run(run, out, ExportOptions(merge, precision, force, data, base))
    total = sum(entry.bytes for entry in described.files.values())
    if as_json:
        print_json({"path": str(out), "hash": described.hash, "bytes": total, "files": sorted(described.files)})
    else:
        say(f"exported: {out} ({len(described.files)} files, {total / 2**20:,.1f} MiB, hash {described.hash[:16]})")
    return 0


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
    from trainer.serving.artefact.push import list_files, push_artefact

    set_up_logging(None, 0, debug=debug)
    if dry_run:
        from rich.table import Table

        files = list_files(folder)
        table = Table("file", "bytes", title=f"would be uploaded to {repo}", title_justify="left")
        for name, size in files.items():
            table.add_row(name, f"{size:,}")
        wide().print(table)
        say(f"{len(files)} files, {sum(files.values()):,} bytes; nothing was uploaded")
        return 0
    say(f"pushed: {push_artefact(folder, repo, private=private, revision=revision)}")
    return 0
