"""Starting a training on several processes: launch local."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from trainer.commands.shared import ConfigFile, Debug, Force, Out, Overrides, check_tasks, default_out

launch_app = typer.Typer(help="Start a training on several processes.", no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="print what will be done, and stop")]


@launch_app.command("local")
def launch_local(
    config: ConfigFile,
    overrides: Overrides = None,
    procs: Annotated[int, typer.Option(min=1, help="processes on this machine, one per GPU")] = 1,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Train on several processes of this machine."""
    from launch.local import command, launch
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    check_tasks(loaded.tasks)
    folder = out or default_out(config, loaded.train.seed)
    line = command(config, overrides or [], folder, force=force, debug=debug)
    if dry_run:
        typer.echo(f"{procs} processes of: {shlex.join(line)}")
        return 0
    return launch(line, procs, folder)
