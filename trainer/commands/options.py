"""Options that several commands have, and how a command takes many of them as one value."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, get_type_hints

import typer

from trainer.commands.output import stdout_to_stderr

if TYPE_CHECKING:
    from trainer.config import RunConfig

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Invocation:
    """What an option asks of the whole process: set while options are parsed, read by :func:`trainer.cli.main`."""

    resources: contextlib.ExitStack
    tracebacks: bool = False


def reserve_stdout(context: typer.Context) -> None:
    """Until the process ends, only the command's result reaches the real stdout; all else goes to stderr."""
    invocation = context.find_object(Invocation)
    if invocation is not None:
        invocation.resources.enter_context(stdout_to_stderr())


def _reserve_for_json(context: typer.Context, value: bool) -> bool:
    if value:
        reserve_stdout(context)
    return value


def _show_tracebacks(context: typer.Context, value: bool) -> bool:
    invocation = context.find_object(Invocation)
    if value and invocation is not None:
        invocation.tracebacks = True
    return value


ConfigFile = Annotated[
    Path, typer.Argument(help="the run's YAML file, or a name of egmf config list", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values that replace the config's, such as train.zero=3", metavar="[KEY=VALUE]..."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="run folder; default runs/<config>-s<seed>, with data.fold runs/<config>-<fold>-s<seed>", metavar="RUN"
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object on stdout, all else on stderr", callback=_reserve_for_json),
]
Force = Annotated[bool, typer.Option("--force", help="continue a run although settings or data differ")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="a module, or .py file, with readers of further formats (repeated); it runs: only code you trust",
    ),
]
Contained = Annotated[
    bool, typer.Option("--contained", help="refuse feature files outside the folder of the file that names them")
]
TrustCode = Annotated[
    str | None,
    typer.Option(
        "--trust-code",
        help="hash of the Python code that the run would bring, which you have read and trust",
        metavar="HASH",
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="show the libraries' own messages and full tracebacks", callback=_show_tracebacks),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done, and stop")]


def default_out(config: Path, seed: int, fold: str | None = None) -> Path:
    """The run folder of a config where none is given; of a dataset with folds every fold has its own."""
    part = "" if fold is None else "-" + re.sub(r"[^\w.-]+", "-", fold)
    return Path("runs") / f"{config.stem}{part}-s{seed}"


def read_config(config: Path, overrides: list[str] | None) -> RunConfig:
    """The resolved config, before anything heavy is loaded.

    Raises:
        ValueError: all faults of the config, or all of its unknown tasks and selecting metrics.
    """
    from trainer.config import load_config
    from trainer.questions import get_tasks

    loaded = load_config(config, overrides or [])
    get_tasks(loaded.tasks, loaded.eval.select)
    return loaded


def option_groups(command: Callable[P, R]) -> Callable[..., R]:
    """Have typer see every field of a dataclass parameter as an option; `command` gets the dataclass.

    typer knows one function parameter per option. With this decorator a command with many options takes those of one
    subject as one value: the fields are annotated as typer's parameters are, and their defaults are the options'.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = inspect.Parameter.KEYWORD_ONLY
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(parameter.replace(kind=kind, annotation=hints[name]))
            continue
        groups[name] = hints[name]
        annotations = get_type_hints(hints[name], include_extras=True)
        parameters += [
            inspect.Parameter(field.name, kind, default=field.default, annotation=annotations[field.name])
            for field in dataclasses.fields(hints[name])
        ]

    @functools.wraps(command)
    def with_groups(**values: Any) -> R:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        return command(**values)  # type: ignore[call-arg]

    with_groups.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_groups
