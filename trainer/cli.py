"""The `egmf` command: parses, calls one function of the package, prints.

With ``--json``, stdout is one JSON object and nothing else. Exit codes: 0 done, 1 fault, 2 usage, 85 stopped and
resumable.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer

from trainer import __version__
from trainer.commands import (
    backbone,
    baseline,
    compare,
    data,
    doctor,
    export,
    extract,
    launching,
    planning,
    reproduce,
    robustness,
    runs,
    serve,
    slurm,
    sweep,
    training,
)
from trainer.commands.options import Invocation
from trainer.commands.output import say
from trainer.distributed.launcher import follow_launcher

app = typer.Typer(
    name="egmf",
    help="Train Expert-Guided Multimodal Fusion (EGMF) with large language models, on one process or many nodes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (
    extract, data, training, sweep, reproduce, runs, baseline, compare, robustness, export, serve, backbone, planning,
    doctor,
):  # fmt: skip
    app.add_typer(commands.app)
app.add_typer(data.data_app, name="data")
app.add_typer(runs.config_app, name="config")
launching.launch_app.command("slurm")(slurm.launch_slurm)
app.add_typer(launching.launch_app, name="launch")
app.add_typer(runs.track_app, name="track")

# typer brings its own copy of click since 0.20, so the base of all usage faults has no public name in every version
USAGE_FAULT: Any = typer.BadParameter.__base__


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"egmf-trainer {__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True, help="put before the command by the deepspeed launcher")
    ] = None,
) -> None:
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


def main() -> None:
    """Run the command line; every fault of the user's is one message on stderr and exit code 1."""
    follow_launcher()
    with contextlib.ExitStack() as resources:
        invocation = Invocation(resources)
        try:
            code = app(prog_name="egmf", standalone_mode=False, obj=invocation)
        except typer.Exit as error:
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:  # raised by a signal's handler
            say("stopped by a signal")
            code = error.code if isinstance(error.code, int) else 1
        except USAGE_FAULT as error:
            error.show()
            code = error.exit_code
        except ValueError as error:
            if invocation.tracebacks:
                raise
            say(f"error: {error}")
            code = 1
        if code == 130:  # Ctrl-C, of which typer makes this code too
            say("interrupted")
        sys.stdout.flush()
    sys.exit(code or 0)
