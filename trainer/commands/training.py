"""Training, and what a trained run is used for: train, evaluate, predict, replay, demo."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.extract import DEFAULT_CLIPS, ClipOptions
from trainer.commands.options import (
    ConfigFile,
    Contained,
    Debug,
    Force,
    Json,
    Out,
    Overrides,
    Plugins,
    TrustCode,
    default_out,
    option_groups,
    read_config,
    reserve_stdout,
)
from trainer.commands.output import print_json, print_metrics, progress_bar, result_descriptor, say, wide
from trainer.commands.ranks import run_as_rank
from trainer.distributed.light_imports import collected_later
from trainer.files import load_json

if TYPE_CHECKING:
    from trainer.distributed.world import World

app = typer.Typer()


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    force: Force = False,
    debug: Debug = False,
) -> int:
    """Train a run, evaluate its best checkpoint, record it. Continues the run folder's last checkpoint."""
    with collected_later():  # it imports torch
        from trainer.distributed.signals import StopRequest

    loaded = read_config(config, overrides)
    folder = out or default_out(config, loaded.train.seed, loaded.data.fold)
    stop = StopRequest(loaded.train.stop_signals)

    def work(world: World) -> int:
        from trainer.logs import set_up_logging
        from trainer.run.loop import fit

        set_up_logging(folder, world.rank, debug=debug)
        code = fit(loaded, folder, world, stop=stop, force=force, report=_report if loaded.track.report else None)
        if code == 0 and world.is_rank_zero:
            print_metrics(load_json((folder / "metrics.json").read_text(encoding="utf-8")))
            say(f"done: {folder}")
        return code

    if loaded.train.deterministic:
        from trainer.run.determinism import set_variables

        set_variables()
    with stop:
        return run_as_rank(work, debug, loaded.train.rendezvous_seconds)


def _report(run: Path) -> list[Path]:
    """See :func:`trainer.results.report.report.write_report`, whose libraries the first step does not wait for."""
    from trainer.results.report.report import write_report

    return write_report(run)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    data: Annotated[str | None, typer.Option(help="another prepared dataset of the same task")] = None,
    predictions: Annotated[Path | None, typer.Option(help="write the predictions to this parquet file")] = None,
    trust_code: TrustCode = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Score a split with a run's best checkpoint. Works on several processes too, under any launcher."""
    from trainer.saved_config import saved_config
    from trainer.serving.check import refuse_artefact

    refuse_artefact(run, "egmf evaluate")
    saved_config(run, overrides or [], data)

    def work(world: World) -> int:
        from trainer.answers.prediction_table import write_predictions
        from trainer.logs import set_up_logging
        from trainer.run.saved import open_run

        set_up_logging(None, world.rank, debug=debug)
        opened = open_run(run, world, overrides or [], data, trust_code)
        total = sum(len(d[split]) for d in opened.parts.data.values())
        with progress_bar(visible=world.is_rank_zero) as bar:
            task = bar.add_task(split, total=total)
            table, metrics = opened.evaluate(split, lambda n: bar.advance(task, n * world.size))
        if world.is_rank_zero:
            if predictions is not None:
                write_predictions(table, predictions)
            if as_json:
                print_json(next(iter(metrics.values())) if len(metrics) == 1 else metrics)
            else:
                print_metrics({"checkpoint": opened.checkpoint.name, split: metrics})
        return 0

    return run_as_rank(work, debug, trains=False)


def _reserve_stdout_for_dash(context: typer.Context, value: str) -> str:
    if value == "-":
        reserve_stdout(context)
    return value


@app.command()
@option_groups
def predict(
    run: Annotated[
        Path,
        typer.Argument(help="a run folder, one of egmf export, or models:/NAME/VERSION of MLflow", metavar="RUN|DIR"),
    ],
    source: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="samples: JSON lines, or any file or folder that prepare reads (repeated: features, annotations); - is stdin",
            metavar="FILE",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="where the predictions go, JSON lines; - is stdout", metavar="FILE", callback=_reserve_stdout_for_dash
        ),
    ],
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="of samples that name none, where the run has several tasks")] = None,
    split: Annotated[str | None, typer.Option(help="answer only this split of the input: train, valid or test")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="add every answer's probability")] = False,
    gates: Annotated[bool, typer.Option("--gates", help="add the weights of experts and modalities")] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="samples at once; default: eval.batch, or as many as eval.tokens holds")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that extract clips")] = 1,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="where an encoder of the recipe is on this machine (repeatable)", metavar="NAME=FOLDER"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="where the backbone is now, if not where it was in training", metavar="PATH")
    ] = None,
    clips: ClipOptions = DEFAULT_CLIPS,
    contained: Contained = False,
    plugin: Plugins = None,
    trust_code: TrustCode = None,
    debug: Debug = False,
) -> int:
    """Answer samples without labels, or clips, with a run's best checkpoint or an exported model.

    Faulty samples are left out and reported on stderr with their place and the reasons; the exit code is then 1.
    """
    from trainer.data.unlabelled.inputs import PredictError, check_places
    from trainer.serving.check import check_source

    chosen = [*(overrides or []), *([] if batch is None else [f"eval.batch={batch}"])]
    chosen += [] if base is None else [f"model.backbone.name={base}"]
    check_source(run, chosen)
    if "-" in source and len(source) > 1:
        raise PredictError("--input - is stdin, which is not read together with files")
    encoders = dict(_named_folder(one) for one in encoder or ())
    if split not in (None, "train", "valid", "test"):
        raise PredictError(f"--split is train, valid or test, not {split!r}")
    places = [Path(name) for name in source if name != "-"]
    check_places(places, None if out == "-" else Path(out), plugin or [])

    def work(world: World) -> int:
        from trainer.data.unlabelled.clips import ClipSettings
        from trainer.logs import set_up_logging
        from trainer.results.predict import Options, predict
        from trainer.serving.locate import open_model
        from trainer.terminal import literal_console

        settings = ClipSettings(workers, clips.device, clips.time_limit, encoders)
        console = literal_console(stderr=True)
        set_up_logging(None, world.rank, debug=debug, console=console)
        opened = open_model(run, world, chosen, trust_code)
        with progress_bar(visible=world.is_rank_zero, console=console) as bar:
            row = bar.add_task("samples", total=None)
            tally = predict(
                opened,
                places or sys.stdin.buffer,
                result_descriptor() if out == "-" else Path(out),
                Options(task, probabilities, gates, split, tuple(plugin or ()), contained, settings),
                report=lambda text: console.print(text, highlight=False, soft_wrap=True),
                advance=lambda n: bar.advance(row, n),
            )
        if world.is_rank_zero:
            say(f"answered: {tally.answered} sample(s); left out: {tally.bad}")
        return 1 if tally.bad else 0

    return run_as_rank(work, debug, trains=False)


def _named_folder(given: str) -> tuple[str, str]:
    """The parts of NAME=FOLDER."""
    name, _, folder = given.partition("=")
    if not (name and folder):
        raise ValueError(f"--encoder is NAME=FOLDER, the name as the recipe has it, not {given!r}")
    return name, folder


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="nonfinite/step-… in a run folder", metavar="FOLDER")],
    overrides: Overrides = None,
    trust_code: TrustCode = None,
    debug: Debug = False,
) -> int:
    """Repeat a step whose loss or gradient was not finite, and name the first module whose output is not finite."""

    def work(world: World) -> int:
        from rich.table import Table

        from trainer.logs import set_up_logging
        from trainer.run.guards.replay import replay as repeat

        set_up_logging(None, world.rank, debug=debug)
        table = Table("micro-batch", "non-finite samples", "first non-finite module", "non-finite gradients")
        for micro in repeat(folder, world, overrides or [], trust_code):
            bad = [name for name, loss in micro.losses.items() if not math.isfinite(loss)]
            gradients = [*micro.gradients[:3], *(["…"] if len(micro.gradients) > 3 else [])]
            table.add_row(
                micro.file, ", ".join(bad) or "none", micro.first_module or "none", ", ".join(gradients) or "none"
            )
        wide().print(table)
        return 0

    return run_as_rank(work, debug)


@app.command()
def demo(
    runs: Annotated[Path, typer.Option(help="where data and runs go", metavar="DIR")] = Path("runs"),
    procs: Annotated[
        int | None, typer.Option(min=1, help="processes; default: two, or one where there is one GPU")
    ] = None,
) -> int:
    """Generate data, train EGMF in 4 bits on two processes, and show that fusion works. Needs no GPU and no download."""
    from launch.start.demo import demo as run_demo
    from launch.start.demo import usual_processes

    return run_demo(runs, procs or usual_processes())
