"""What a run has to beat: baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainer.commands.options import Json
from trainer.commands.output import print_json, print_metrics, say

if TYPE_CHECKING:
    from trainer.answers.scores import TaskScores

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
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="of a dataset with several questions: the one to answer (repeatable); default: each",
            metavar="QUESTION",
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

    whole = open_dataset(data)
    opened = [whole.asking(name) for name in task or whole.tasks]
    wanted = {one.task.name: specs(one, modalities or [], ngrams, tune=tune) for one in opened}
    if out is not None and (count := sum(map(len, wanted.values()))) > 1:
        several = ", and a question with --task" if len(opened) > 1 else ""
        raise BaselineError(
            f"--out names the folder of one baseline, and there are {count}: name one with --modalities{several}"
        )
    for one in opened:
        check_data(one, wanted[one.task.name])
    results: dict[str, dict[str, dict[str, TaskScores]]] = {}
    for one in opened:
        name = one.task.name
        folders = {spec: out or runs / f"baseline-{name}-{spec.name}" for spec in wanted[name]}
        results[name] = {}
        for spec, folder in folders.items():
            check_out(folder)
            found = fit_baseline(one, spec)
            write_baseline(found, one.fingerprint, folder, force=force)
            results[name][spec.name] = {split: scores[name] for split, scores in found.scores.items()}
            say(f"written: {folder}")
    if as_json:
        print_json(results if len(whole.tasks) > 1 else next(iter(results.values())))
        return
    for name, of_task in results.items():
        head = f"{name} " if len(whole.tasks) > 1 else ""
        for split in ("valid", "test"):
            print_metrics({f"{head}{split}": {spec: scores[split] for spec, scores in of_task.items()}})
