"""Looking at configs and runs: show, runs, report, track sync, config list, show and check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import ConfigFile, Json, Overrides, read_config
from trainer.commands.output import print_json, say, wide

app = typer.Typer()
config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)
track_app = typer.Typer(help="The record of runs in MLflow.", no_args_is_help=True)


@app.command()
def show(run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")], as_json: Json = False) -> None:
    """Show a run: scores, training curves as numbers, gate weights, examples, config, environment."""
    from trainer.results.show import run_json, show_run

    if as_json:
        print_json(run_json(run))
    else:
        wide().print(show_run(run), soft_wrap=False)


@app.command("runs")
def list_runs_command(
    folder: Annotated[Path, typer.Argument(help="a folder of run folders", metavar="[FOLDER]")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs of a folder: state and its reason, step, selecting metric, time since the last activity."""
    from trainer.results.runs import lines_json, list_runs, runs_table

    lines = list_runs(folder)
    if as_json:
        print_json(lines_json(lines))
    else:
        wide().print(runs_table(lines) if lines else f"no runs in {folder}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")]) -> None:
    """Write a run's report.html and its pictures; also for runs in progress."""
    from trainer.results.report.report import PAGE, write_report

    pictures = write_report(run)
    say(f"written: {run / PAGE} and {len(pictures)} pictures in {pictures[0].parent if pictures else run}")


@track_app.command("sync")
def track_sync(
    runs: Annotated[list[Path], typer.Argument(help="run folders", metavar="RUN...")],
    uri: Annotated[
        str | None,
        typer.Option(help="MLflow server or store; default: the config's track.uri, else MLFLOW_TRACKING_URI"),
    ] = None,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="send all records to another MLflow run: theirs was deleted on the server")
    ] = False,
) -> int:
    """Send MLflow what it missed of runs: while it was down, after their process was killed, or with track.mlflow=false."""
    from trainer.logs import set_up_logging
    from trainer.tracking.outbox import sync

    set_up_logging(None, 0)
    code = 0
    for run in runs:
        try:
            result = sync(run, uri, new_run=new_run)
        except ValueError as error:
            say(f"error: {error}")
            code = 1
            continue
        refused = f", {result.refused} refused" if result.refused else ""
        say(f"{run}: {result.sent} records sent, {result.left} left{refused}; MLflow {result.uri}, run {result.run_id}")
        if result.trouble:
            say(f"error: MLflow does not take the records of {run}: {result.trouble}; they wait in its journal")
            code = 1
    return code


@config_app.command("list")
def config_list(as_json: Json = False) -> None:
    """List the configs, suites and recipes that come with the package; each can be given by its name as CONFIG, SUITE or RECIPE."""
    from rich.table import Table
    from rich.text import Text

    from trainer.shipped import list_configs, list_recipes, list_suites

    shipped = {"configs": list_configs(), "suites": list_suites(), "recipes": list_recipes()}
    if as_json:
        print_json(
            {kind: [{**one._asdict(), "path": str(one.path)} for one in found] for kind, found in shipped.items()}
        )
        return
    for kind, found in shipped.items():
        table = Table(kind, "description")
        for one in found:
            table.add_row(one.name, Text(one.description))
        wide().print(table)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved config: what it extends and the overrides merged, every default filled in."""
    from trainer.config import dump_config, load_config

    typer.echo(dump_config(load_config(config, overrides or [])), nl=False)


@config_app.command("check")
def config_check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate a config and its task; every fault in one message."""
    read_config(config, overrides)
    say(f"{config}: ok")
