"""The `egmf` command: parses, calls one function of the package, prints.

With ``--json``, stdout is one JSON object and nothing else. Exit codes: 0 done, 1 fault, 2 usage, 85 stopped and
resumable.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

app = typer.Typer(
    name="egmf",
    help="Train Expert-Guided Multimodal Fusion (EGMF) with large language models, on one process or many nodes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at prepared datasets.", no_args_is_help=True)
config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)
launch_app = typer.Typer(help="Start a training on several processes.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(launch_app, name="launch")
track_app = typer.Typer(help="The record of runs in MLflow.", no_args_is_help=True)
app.add_typer(track_app, name="track")

ConfigFile = Annotated[Path, typer.Argument(help="the run's YAML config", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values that replace the config's, such as train.zero=3", metavar="[KEY=VALUE]..."),
]
Out = Annotated[Path | None, typer.Option(help="run folder; default runs/<config>-s<seed>", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, all else on stderr")]
Debug = Annotated[bool, typer.Option("--debug", help="show the libraries' own messages and full tracebacks")]


def main() -> None:
    """Run the command line; every fault of the user's is one message on stderr and exit code 1."""
    arguments = sys.argv[1:]
    rank = next((a.partition("=")[2] for a in arguments if re.fullmatch(r"--local_rank=\d+", a)), None)
    if rank is not None:  # the deepspeed launcher puts it in front of the command
        os.environ.setdefault("LOCAL_RANK", rank)
    arguments = [a for a in arguments if not re.fullmatch(r"--local_rank=\d+", a)]
    arguments = _spread(["--drop-bad=train" if a == "--drop-bad" else a for a in arguments])
    with contextlib.ExitStack() as stack:
        if "--json" in arguments or _predicts_to_stdout(arguments):
            stack.enter_context(_stdout_to_stderr())
        try:
            code = app(arguments, prog_name="egmf", standalone_mode=False)
        except typer.Exit as error:
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:  # raised by a signal's handler
            _say("stopped by a signal")
            code = error.code if isinstance(error.code, int) else 1
        except ValueError as error:
            if "--debug" in arguments:
                raise
            _say(f"error: {error}")
            code = 1
        except Exception as error:
            if type(error).__module__.startswith("typer"):  # usage: typer's own exceptions know how to show themselves
                error.show()  # type: ignore[attr-defined]
                code = getattr(error, "exit_code", 2)
            else:
                raise
        if code == 130:  # Ctrl-C, of which typer makes this code too
            _say("interrupted")
        sys.stdout.flush()
    sys.exit(code or 0)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    force: Annotated[bool, typer.Option("--force", help="continue a run although settings or data differ")] = False,
    debug: Debug = False,
) -> int:
    """Train a run, evaluate its best checkpoint, record it. Continues the run folder's last checkpoint."""
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    _check_tasks(loaded.tasks)
    folder = out or default_out(config, loaded.train.seed)

    def work(world: Any) -> int:
        from trainer.results.report import write_report
        from trainer.run.logs import set_up_logging
        from trainer.run.loop import fit

        set_up_logging(folder, world.rank, debug=debug)
        code = fit(loaded, folder, world, force=force, report=write_report if loaded.track.report else None)
        if code == 0 and world.first:
            _print_metrics(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
            _say(f"done: {folder}")
        return code

    return _in_world(work, debug)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    data: Annotated[str | None, typer.Option(help="another prepared dataset of the same task")] = None,
    predictions: Annotated[Path | None, typer.Option(help="write the predictions to this parquet file")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Score a split with a run's best checkpoint. Works on several processes too, under any launcher."""
    from trainer.run.files import saved_config

    saved_config(run, overrides or [], data)

    def work(world: Any) -> int:
        from trainer.run.evaluate import write_predictions
        from trainer.run.logs import set_up_logging
        from trainer.run.saved import open_run

        set_up_logging(None, world.rank, debug=debug)
        opened = open_run(run, world, overrides or [], data)
        total = sum(len(d[split]) for d in opened.parts.data.values())
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not (world.first and console.is_terminal)) as bar:
            task = bar.add_task(split, total=total)
            table, metrics = opened.evaluate(split, lambda n: bar.advance(task, n * world.size))
        if world.first:
            if predictions is not None:
                write_predictions(table, predictions)
            if as_json:
                _print_json(next(iter(metrics.values())) if len(metrics) == 1 else metrics)
            else:
                _print_metrics({"checkpoint": opened.checkpoint.name, split: metrics})
        return 0

    return _in_world(work, debug)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="nonfinite/step-… in a run folder", metavar="FOLDER")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> int:
    """Repeat a step whose loss or gradient was no number, and name the module where it begins."""

    def work(world: Any) -> int:
        from trainer.run.logs import set_up_logging
        from trainer.run.replay import replay as repeat

        set_up_logging(None, world.rank, debug=debug)
        table = Table("micro-batch", "samples without a number", "first such module", "gradients without a number")
        for micro in repeat(folder, world, overrides or []):
            bad = [name for name, loss in micro.losses.items() if not math.isfinite(loss)]
            gradients = [*micro.gradients[:3], *(["…"] if len(micro.gradients) > 3 else [])]
            table.add_row(
                micro.file, ", ".join(bad) or "none", micro.first_module or "none", ", ".join(gradients) or "none"
            )
        _wide().print(table)
        return 0

    return _in_world(work, debug)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")],
    source: Annotated[str, typer.Option("--input", help="JSON lines of samples; - is stdin", metavar="FILE")],
    out: Annotated[str, typer.Option(help="where the predictions go, JSON lines; - is stdout", metavar="FILE")],
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="of lines that name none, where the run has several tasks")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="add every answer's probability")] = False,
    gates: Annotated[bool, typer.Option("--gates", help="add the weights of experts and modalities")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="samples at once; default eval.batch")] = None,
    debug: Debug = False,
) -> int:
    """Answer own samples with a run's best checkpoint.

    Faulty lines are left out and told on stderr with number and reason; the exit code is then 1.
    """
    from trainer.results.predict import Options, check_places, predict
    from trainer.run.files import saved_config

    chosen = [*(overrides or []), *([] if batch is None else [f"eval.batch={batch}"])]
    saved_config(run, chosen)
    place = None if source == "-" else Path(source)
    check_places(place, None if out == "-" else Path(out))

    def work(world: Any) -> int:
        from trainer.run.logs import set_up_logging
        from trainer.run.saved import open_run

        console = Console(stderr=True)
        set_up_logging(None, world.rank, debug=debug, console=console)
        opened = open_run(run, world, chosen)
        with contextlib.ExitStack() as stack:
            lines = sys.stdin.buffer if place is None else stack.enter_context(place.open("rb"))
            bar = stack.enter_context(
                Progress(console=console, transient=True, disable=not (world.first and console.is_terminal))
            )
            row = bar.add_task("lines", total=None)
            tally = predict(
                opened,
                lines,
                Path() if place is None else place.parent,
                _json_out if out == "-" else Path(out),
                Options(task, probabilities, gates),
                say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
                advance=lambda n: bar.advance(row, n),
            )
        if world.first:
            _say(f"answered: {tally.answered} line(s); left out: {tally.bad}")
        return 1 if tally.bad else 0

    return _in_world(work, debug)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="a task, or a YAML file that defines one", metavar="TASK")],
    out: Annotated[Path, typer.Option(help="where the prepared dataset goes", metavar="DIR")],
    source: Annotated[list[Path] | None, typer.Option(help="published files, or folders of them")] = None,
    task_file: Annotated[Path | None, typer.Option("--task", help="YAML file that defines TASK, for own data")] = None,
    strict: Annotated[bool, typer.Option(help="refuse every fault, also those with one right repair")] = False,
    drop_bad: Annotated[
        str, typer.Option(help="leave faulty samples out: of train (--drop-bad), of every split (--drop-bad=all)")
    ] = "none",
    force: Annotated[bool, typer.Option(help="replace another prepared dataset in DIR")] = False,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    seed: Annotated[int, typer.Option(help="of the generated tasks (diagnostic)")] = 0,
    size: Annotated[
        list[str] | None,
        typer.Option(help="of the generated tasks: SPLIT=N, such as train=4000"),
    ] = None,
) -> None:
    """Read published files once, check them, and write a memory-mapped dataset.

    The diagnostic tasks are generated and take no --source.
    """
    from trainer.data.prepare import prepare as prepare_files
    from trainer.data.summary import summary_table
    from trainer.tasks import get_task

    if drop_bad not in ("none", "train", "all"):
        raise ValueError(f"--drop-bad is 'train' or 'all', not {drop_bad!r}")
    task = _defined(name, task_file)
    options: dict[str, Any] = {"strict": strict, "drop_bad": drop_bad, "force": force, "workers": workers}
    with _splits_bar() as progress:
        if task.name.startswith("diagnostic") and get_task(task.name) == task:
            from trainer.data.diagnostic import generate

            if source:
                raise ValueError(f"{task.name} is generated: it takes no --source")
            summary = generate(task.name, out, seed=seed, sizes=_sizes(size), force=force, progress=progress)
        elif not source:
            raise ValueError(f"egmf prepare {name} needs --source: the published files, or a folder of them")
        else:
            summary = prepare_files(task, source, out, progress=progress, **options)
    _wide().print(summary_table(summary.record))
    _say(f"{'unchanged' if summary.unchanged else 'written'}: {out}")


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(help="a prepared dataset", metavar="DIR")], as_json: Json = False
) -> None:
    """Samples, labels, lengths and missing modalities of a prepared dataset."""
    from trainer.data.dataset import open_dataset
    from trainer.data.summary import summary_json, summary_table

    record = open_dataset(folder).record
    if as_json:
        _print_json(summary_json(record))
    else:
        _wide().print(summary_table(record))


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="CSV with the columns id, label, prediction", metavar="FILE")],
    task: Annotated[str, typer.Option(help="the task, or a YAML file that defines one")],
    as_json: Json = False,
) -> None:
    """Score any system's predictions with the benchmark's own metrics."""
    from trainer.answers.score_file import score_predictions
    from trainer.tasks import get_task

    chosen = get_task(task)
    metrics = score_predictions(chosen, predictions)
    if as_json:
        _print_json(metrics)
    else:
        _print_metrics({predictions.name: {chosen.name: metrics}})


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")]) -> None:
    """Write a run's report.html and its pictures; works on runs in progress too."""
    from trainer.results.report import PAGE, write_report

    pictures = write_report(run)
    _say(f"written: {run / PAGE} and {len(pictures)} pictures in {pictures[0].parent if pictures else run}")


@app.command()
def show(run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")], as_json: Json = False) -> None:
    """Show a run: scores, curves in numbers, gate weights, examples, config, environment."""
    from trainer.results.show import run_json, show_run

    if as_json:
        _print_json(run_json(run))
    else:
        _wide().print(show_run(run), soft_wrap=False)


@app.command("runs")
def list_runs_command(
    folder: Annotated[Path, typer.Argument(help="a folder of run folders", metavar="[FOLDER]")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs of a folder: state and why, step, the selecting metric, age."""
    from trainer.results.runs import lines_json, list_runs, runs_table

    lines = list_runs(folder)
    if as_json:
        _print_json(lines_json(lines))
    else:
        _wide().print(runs_table(lines) if lines else f"no runs in {folder}")


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved config: what it extends and the overrides merged, every default filled in."""
    from trainer.config import dump_config, load_config

    typer.echo(dump_config(load_config(config, overrides or [])), nl=False)


@config_app.command("check")
def config_check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate a config and its task; every fault in one message."""
    from trainer.config import load_config

    _check_tasks(load_config(config, overrides or []).tasks)
    _say(f"{config}: ok")


@launch_app.command("local")
def launch_local(
    config: ConfigFile,
    overrides: Overrides = None,
    procs: Annotated[int, typer.Option(min=1, help="processes on this machine, one per GPU")] = 1,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the command and stop")] = False,
    debug: Debug = False,
) -> int:
    """Train on several processes of this machine."""
    from launch.local import command, launch
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    _check_tasks(loaded.tasks)
    folder = out or default_out(config, loaded.train.seed)
    line = command(config, overrides or [], folder, debug=debug)
    if dry_run:
        typer.echo(f"{procs} processes of: {shlex.join(line)}")
        return 0
    return launch(line, procs, folder)


@track_app.command("sync")
def track_sync(
    runs: Annotated[list[Path], typer.Argument(help="run folders", metavar="RUN...")],
    uri: Annotated[str | None, typer.Option(help="another MLflow server or store than the config's track.uri")] = None,
) -> int:
    """Send MLflow what it missed of runs: while it was down, after their process was killed, or with track.mlflow=false."""
    from trainer.run.logs import set_up_logging
    from trainer.run.outbox import sync

    set_up_logging(None, 0)
    code = 0
    for run in runs:
        try:
            result = sync(run, uri)
        except ValueError as error:
            _say(f"error: {error}")
            code = 1
            continue
        refused = f", {result.refused} refused" if result.refused else ""
        _say(
            f"{run}: {result.sent} records sent, {result.left} left{refused}; MLflow {result.uri}, run {result.run_id}"
        )
        if result.trouble:
            _say(f"error: MLflow does not take the records of {run}: {result.trouble}; they wait in its journal")
            code = 1
    return code


@app.command()
def demo(
    runs: Annotated[Path, typer.Option(help="where data and runs go", metavar="DIR")] = Path("runs"),
    procs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> int:
    """Generate data, train EGMF in 4 bits on two processes, and show that fusion works. Needs no GPU and no download."""
    from launch.demo import demo as run_demo

    return run_demo(runs, procs)


def default_out(config: Path, seed: int) -> Path:
    """The run folder of a config where none is given."""
    return Path("runs") / f"{config.stem}-s{seed}"


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


def _in_world(work: Callable[[Any], int], debug: bool) -> int:
    """`work` in this process's place among the run's; a fault names its rank and ends the process at once."""
    from trainer.run.distributed import quiet_deepspeed

    quiet_deepspeed()
    from trainer.run.distributed import start_world, stop_world
    from trainer.run.logs import set_up_logging

    set_up_logging(None, int(os.environ.get("RANK", "0")), debug=debug)
    world = start_world()
    try:
        code = work(world)
    except Exception as error:
        if world.size == 1:
            raise
        # leaving the process group would wait for the others; they end when they miss this rank
        if debug or not isinstance(error, ValueError):
            import traceback

            traceback.print_exc()
        _say(f"error on rank {world.rank}: {error}")
        sys.stderr.flush()
        _tell_launcher(error)
        os._exit(1)
    stop_world()
    return code


def _tell_launcher(error: Exception) -> None:
    """Leave the cause where our launcher, and torchrun, look for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)


def _check_tasks(names: list[str]) -> None:
    """Refuse unknown tasks before anything heavy is loaded; all of them at once."""
    from trainer.tasks import TaskError, get_task

    faults = []
    for name in names:
        try:
            get_task(name)
        except TaskError as error:
            faults.append(str(error))
    if faults:
        raise TaskError("\n".join(faults))


def _defined(name: str, task_file: Path | None) -> Any:
    from trainer.tasks import get_task

    if task_file is None:
        return get_task(name)
    task = get_task(str(task_file))
    if task.name != name:
        raise ValueError(f"{task_file} defines the task {task.name!r}, not {name!r}")
    return task


def _sizes(given: list[str] | None) -> dict[str, int] | None:
    if not given:
        return None
    bad = [text for text in given if not re.fullmatch(r"(train|valid|test)=[1-9]\d*", text)]
    if bad:
        raise ValueError(f"--size is SPLIT=N with a split of train, valid, test; not {', '.join(bad)}")
    return {split: int(n) for split, _, n in (text.partition("=") for text in given)}


@contextlib.contextmanager
def _splits_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        rows: dict[str, Any] = {}

        def progress(split: str, done: int, total: int | None) -> None:
            if split not in rows:
                rows[split] = bar.add_task(split, total=total)
            bar.update(rows[split], completed=done, total=total)

        yield progress


def _print_metrics(results: dict[str, Any]) -> None:
    """A table of the scalar metrics, a column per split and task."""
    columns = {
        (split, task): values
        for split, tasks in results.items()
        if isinstance(tasks, dict)
        for task, values in tasks.items()
    }
    names = list(
        dict.fromkeys(k for v in columns.values() for k, x in v.items() if x is None or isinstance(x, (int, float)))
    )
    table = Table(
        title=f"checkpoint {results['checkpoint']}" if "checkpoint" in results else None, title_justify="left"
    )
    table.add_column("metric")
    for split, task in columns:
        table.add_column(f"{task} {split}", justify="right")
    for name in names:
        table.add_row(name, *(_number(values.get(name, "")) for values in columns.values()))
    _wide().print(table)


def _number(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _wide() -> Console:
    """A console that never cuts a table: as wide as it needs where stdout is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


_json_out = 1


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever this process and its libraries write to stdout goes to stderr; `_print_json` keeps the real one."""
    global _json_out
    sys.stdout.flush()
    _json_out = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(_json_out, 1)
        os.close(_json_out)
        _json_out = 1


def _predicts_to_stdout(arguments: list[str]) -> bool:
    asked = "--out=-" in arguments or ("--out", "-") in itertools.pairwise(arguments)
    return arguments[:1] == ["predict"] and asked


def _print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with os.fdopen(os.dup(_json_out), "w", encoding="utf-8") as stream:
        stream.write(text)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
