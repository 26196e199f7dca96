"""A run scored with missing and corrupted modalities: robustness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import Debug, Json, Overrides, TrustCode
from trainer.commands.output import print_json, progress_bar, say, wide
from trainer.commands.ranks import run_as_rank

if TYPE_CHECKING:
    from trainer.distributed.world import World
    from trainer.results.records import RobustnessRecord

app = typer.Typer()


@app.command()
def robustness(
    run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    rates: Annotated[
        str, typer.Option(help="probabilities at which samples or frames are corrupted", metavar="R,R,...")
    ] = "0,0.25,0.5,0.75,1",
    modes: Annotated[
        str,
        typer.Option(
            help="missing: a sample lacks the modality; noise: on frames; frames: frames dropped", metavar="MODE,..."
        ),
    ] = "missing,noise",
    modalities: Annotated[
        str | None, typer.Option(help="default: audio and video, those that the run reads", metavar="NAME,...")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the corruption")] = 0,
    reference: Annotated[
        Path | None, typer.Option(help="a finished run to compare with, such as a text-only one", metavar="RUN")
    ] = None,
    trust_code: TrustCode = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Score a run's best checkpoint with modalities dropped or corrupted, and put the curves into its report.

    Writes robustness.json and robustness.parquet into the run folder. Works on several processes too.
    """
    from trainer.saved_config import saved_config

    saved_config(run, overrides or [])
    try:
        chances = tuple(float(word) for word in _words(rates))
    except ValueError:
        raise ValueError(f"--rates={rates} must be numbers from 0 to 1, separated by commas") from None

    def work(world: World) -> int:
        from trainer.logs import set_up_logging
        from trainer.results.robustness import Options, check_options, write_robustness
        from trainer.results.robustness import robustness as measure
        from trainer.run.saved import open_run

        set_up_logging(None, world.rank, debug=debug)
        options = Options(split, chances, _words(modes), _words(modalities or ""), seed)  # type: ignore[arg-type]
        check_options(options)
        opened = open_run(run, world, overrides or [], agreed=trust_code)
        with progress_bar(visible=world.is_rank_zero) as bar:
            task = bar.add_task(split, total=None)
            result, table = measure(opened, options, reference, lambda n: bar.advance(task, n * world.size))
        if world.is_rank_zero:
            write_robustness(run, result, table)
            if opened.config.track.report:
                from trainer.results.report.report import write_report

                write_report(run)
            if as_json:
                print_json(result)
            else:
                _print(result)
                say(f"written: {run / 'robustness.json'}")
        return 0

    return run_as_rank(work, debug, trains=False)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _print(record: RobustnessRecord) -> None:
    from trainer.results.printable import rich_table
    from trainer.results.tables import robustness as robustness_table
    from trainer.results.task_results import Robustness

    for name, measured in record["tasks"].items():
        table = robustness_table(name, Robustness(measured, record["split"], record["reference"]))
        wide().print(rich_table(table))
        if table.note:
            say(table.note)
