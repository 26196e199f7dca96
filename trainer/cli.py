"""The `egmf` command: parses, calls one function of the package, prints.

With ``--json``, stdout is one JSON object and nothing else. Exit codes: 0 done, 1 fault, 2 usage, 85 stopped and
resumable.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from typing import Annotated

import typer

from trainer import __version__
from trainer.commands import (
    compare,
    data,
    doctor,
    launching,
    planning,
    reproduce,
    robustness,
    runs,
    slurm,
    sweep,
    training,
)
from trainer.commands.shared import say, stdout_to_stderr
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
for commands in (data, training, sweep, reproduce, runs, compare, robustness, planning, doctor):
    app.add_typer(commands.app)
app.add_typer(data.data_app, name="data")
app.add_typer(runs.config_app, name="config")
launching.launch_app.command("slurm")(slurm.launch_slurm)
app.add_typer(launching.launch_app, name="launch")
app.add_typer(runs.track_app, name="track")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"egmf-trainer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line; every fault of the user's is one message on stderr and exit code 1."""
    follow_launcher()
    arguments = sys.argv[1:]
    rank = next((a.partition("=")[2] for a in arguments if re.fullmatch(r"--local_rank=\d+", a)), None)
    if rank is not None:  # the deepspeed launcher puts it in front of the command
        os.environ.setdefault("LOCAL_RANK", rank)
    arguments = [a for a in arguments if not re.fullmatch(r"--local_rank=\d+", a)]
    arguments = _spread(["--drop-bad=train" if a == "--drop-bad" else a for a in arguments])
    with contextlib.ExitStack() as stack:
        if "--json" in arguments or _predicts_to_stdout(arguments):
            stack.enter_context(stdout_to_stderr())
        try:
            code = app(arguments, prog_name="egmf", standalone_mode=False)
        except typer.Exit as error:
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:  # raised by a signal's handler
            say("stopped by a signal")
            code = error.code if isinstance(error.code, int) else 1
        except ValueError as error:
            if "--debug" in arguments:
                raise
            say(f"error: {error}")
            code = 1
        except Exception as error:
            if type(error).__module__.startswith("typer"):  # usage: typer's own exceptions know how to show themselves
                error.show()  # type: ignore[attr-defined]
                code = getattr(error, "exit_code", 2)
            else:
                raise
        if code == 130:  # Ctrl-C, of which typer makes this code too
            say("interrupted")
        sys.stdout.flush()
    sys.exit(code or 0)


def _spread(arguments: list[str]) -> list[str]:
    """``--source A B C`` as the repeated option that the parser knows; TASK stands before it."""
    if arguments[:1] != ["prepare"] or len(arguments) < 2 or arguments[1].startswith("-"):
        return arguments
    out: list[str] = []
    inside = False
    for word in arguments:
        if inside and not word.startswith("-") and out[-1] != "--source":
            out.append("--source")
        inside = word == "--source" or (inside and not word.startswith("-"))
        out.append(word)
    return out


def _predicts_to_stdout(arguments: list[str]) -> bool:
    asked = "--out=-" in arguments or ("--out", "-") in itertools.pairwise(arguments)
    return arguments[:1] == ["predict"] and asked
