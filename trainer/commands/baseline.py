"""What a run has to beat: baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.commands.options import Json
from trainer.commands.output import print_json, print_metrics, say

app = typer.Typer()


@app.command()
def baseline(
    data: Annotated[Path, typer.Argument(help="a prepared dataset", metavar="DIR")],
    modalities: Annotated[
        list[str] | None,
        typer.Option(
            help="what a baseline reads, joined by commas, or constant (repeatable: one baseline each); default: the constant "
            "answer, each modality that train has, and all of them",
            metavar="NAME[,NAME]",
        ),
    ] = None,
    ngrams: Annotated[
        Literal["words", "characters", "both"] | None,
        typer.Option(help="n-grams of text; default: characters for Chinese tasks, else words"),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="choose C or alpha on valid; default: 1")] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder of a single baseline; default RUNS/baseline-TASK-NAME", metavar="RUN")
    ] = None,
    runs: Annotated[Path, typer.Option(help="where the folders of the baselines go", metavar="RUNS")] = Path("runs"),
    force: Annotated[bool, typer.Option("--force", help="replace another baseline in the folder")] = False,
    as_json: Json = False,
) -> None:
    """Fit TF-IDF and frame statistics with logistic regression or ridge, and score them as a run is scored.

    For example: egmf baseline data/meld
    """
    from trainer.baselines.baseline import BaselineError, check_data, check_out, fit_baseline, specs, write_baseline
    from trainer.data.dataset import open_dataset

    opened = open_dataset(data)
    wanted = specs(opened, modalities or [], ngrams, tune=tune)
    if out is not None and len(wanted) > 1:
        raise BaselineError(
            f"--out names the folder of one baseline, and there are {len(wanted)}: name one with --modalities"
        )
    check_data(opened, wanted)
    folders = {spec: out or runs / f"baseline-{opened.task.name}-{spec.name}" for spec in wanted}
    results = {}
    for spec, folder in folders.items():
        check_out(folder)
        found = fit_baseline(opened, spec)
        write_baseline(found, opened.fingerprint, folder, force=force)
        results[spec.name] = {split: scores[opened.task.name] for split, scores in found.scores.items()}
        say(f"written: {folder}")
    if as_json:
        print_json(results)
        return
    for split in ("valid", "test"):
        print_metrics({split: {name: scores[split] for name, scores in results.items()}})
