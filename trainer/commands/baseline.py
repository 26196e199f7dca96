"""What a run has to beat: baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trainer.commands.options import Json
from trainer.commands.output import print_columns, print_json, print_metrics, say

if TYPE_CHECKING:
    from trainer.baselines.baseline import Baseline, Spec
    from trainer.data.dataset import PreparedDataset

app = typer.Typer()

SHOWN_FOLDS = 10  # folds up to which each has a column


@app.command()
def baseline(
    data: Annotated[
        Path, typer.Argument(help="a prepared dataset; a task's name stands for data/TASK", metavar="DIR|TASK")
    ],
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
    fold: Annotated[
        str | None,
        typer.Option(
            help="of a dataset with folds: test this one alone, by its name or its number from 1; default: every fold",
            metavar="NAME",
        ),
    ] = None,
    fold_valid: Annotated[
        str,
        typer.Option(help="what validates a fold, as a run's data.fold_valid: next, or a share", metavar="next|SHARE"),
    ] = "next",
    seed: Annotated[int, typer.Option(help="draws the share of --fold-valid, as a run's train.seed")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of a single baseline; default RUNS/baseline-TASK-NAME[-fold=FOLD]", metavar="RUN"),
    ] = None,
    runs: Annotated[Path, typer.Option(help="where the folders of the baselines go", metavar="RUNS")] = Path("runs"),
    force: Annotated[bool, typer.Option("--force", help="replace another baseline in the folder")] = False,
    as_json: Json = False,
) -> None:
    """Fit TF-IDF and frame statistics with logistic regression or ridge, and score them as a run is scored.

    For example: egmf baseline data/meld

    Of a dataset with folds every baseline is fitted once for each, on its own training samples, and scored fold by fold, by the
    mean over folds, and on the predictions of all folds together.
    """
    from trainer.baselines.baseline import BaselineError, check_data, specs
    from trainer.baselines.folds import check_folds, fold_faults, open_folds
    from trainer.data.dataset import open_dataset

    if not data.exists() and data.name == str(data) and (Path("data") / data).is_dir():
        data = Path("data") / data
    whole = open_dataset(data)
    opened = {name: whole.asking(name) for name in task or whole.tasks}
    faults = fold_faults(whole, fold)
    if not whole.folds and (fold_valid, seed) != ("next", 0):
        faults.append(f"{data} has no folds: leave --fold-valid and --seed out")
    valid = _fold_valid(fold_valid, faults)
    wanted: dict[str, list[Spec]] = {}
    for name, one in opened.items():
        try:
            wanted[name] = specs(one, modalities or [], ngrams, tune=tune)
        except BaselineError as error:
            faults.append(str(error))
    if out is not None:
        faults += _several(whole, wanted, fold)
    if faults:
        raise BaselineError("\n".join(dict.fromkeys(faults)))
    folds = {name: open_folds(one, fold, valid, seed) for name, one in opened.items()} if whole.folds else {}
    for name, one in opened.items():
        if whole.folds:
            check_folds(folds[name], wanted[name])
        else:
            check_data(one, wanted[name])
    results: dict[str, Any] = {}
    for name, one in opened.items():
        head = f"{name} " if len(whole.tasks) > 1 else ""
        if whole.folds:
            results[name] = _fit_folds(
                folds[name],
                wanted[name],
                whole.folds,
                out,
                runs,
                force=force,
                single=fold is not None,
                head=head,
                show=not as_json,
            )
            continue
        folders = {spec: out or runs / f"baseline-{name}-{spec.name}" for spec in wanted[name]}
        fitted = _fit({(spec, ""): (one, folder) for spec, folder in folders.items()}, force=force)
        results[name] = _one_each({spec.name: found for (spec, _), found in fitted.items()}, head, show=not as_json)
    if as_json:
        print_json(results if len(whole.tasks) > 1 else next(iter(results.values())))


def _several(data: PreparedDataset, wanted: Mapping[str, Sequence[Spec]], fold: str | None) -> list[str]:
    """That one folder cannot hold several baselines, and which options name a single one."""
    every_fold = bool(data.folds) and fold is None
    count = sum(map(len, wanted.values())) * (len(data.folds) if every_fold else 1)
    if count < 2:
        return []
    options = ["--modalities", *(["--fold"] if every_fold else []), *(["--task"] if len(wanted) > 1 else [])]
    return [f"--out names the folder of one baseline, and there are {count}: name one with {' and '.join(options)}"]


def _fold_valid(text: str, faults: list[str]) -> Literal["next"] | float:
    """What --fold-valid says; a fault where it is neither ``next`` nor a share."""
    if text == "next":
        return "next"
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        faults.append(f"--fold-valid is next, or a share between 0 and 1, not {text!r}")
    return share


def _fit(
    asked: Mapping[tuple[Spec, str], tuple[PreparedDataset, Path]], *, force: bool
) -> dict[tuple[Spec, str], Baseline]:
    """Fit and write the baseline of each spec and fold on its data, into its folder; all folders are looked at before."""
    from trainer.baselines.baseline import BaselineError, check_out, fit_baseline, write_baseline

    faults = []
    for _, folder in asked.values():
        try:
            check_out(folder)
        except BaselineError as error:
            faults.append(str(error))
    if faults:
        raise BaselineError("\n".join(faults))
    found = {}
    for key, (data, folder) in asked.items():
        found[key] = fit_baseline(data, key[0])
        write_baseline(found[key], data.fingerprint, folder, force=force)
        say(f"written: {folder}")
    return found


def _fit_folds(
    datasets: Mapping[str, PreparedDataset], wanted: Sequence[Spec], every: Sequence[str], out: Path | None, runs: Path,
    *, force: bool, single: bool, head: str, show: bool,
) -> dict[str, Any]:  # fmt: skip
    """Fit every baseline on every fold; each fold's scores, their mean, and those of all folds together, by baseline."""
    from trainer.baselines.folds import fold_folders, over_folds

    task = next(iter(datasets.values())).task
    asked: dict[tuple[Spec, str], tuple[PreparedDataset, Path]] = {}
    for spec in wanted:
        folders = fold_folders(runs, f"baseline-{task.name}-{spec.name}", datasets, every)
        asked |= {(spec, name): (data, out or folders[name]) for name, data in datasets.items()}
    fitted = _fit(asked, force=force)
    if single:
        return _one_each({spec.name: one for (spec, _), one in fitted.items()}, head, show=show)
    results = {spec.name: over_folds({name: fitted[spec, name] for name in datasets}) for spec in wanted}
    for name, one in results.items() if show else ():
        for split in ("valid", "test"):
            columns = {f"fold {fold}": scores[split] for fold, scores in one.folds.items()}
            columns = columns if len(columns) <= SHOWN_FOLDS else {}
            columns |= {"mean of folds": one.mean[split], "sd of folds": one.sd[split]}  # type: ignore[dict-item]
            columns |= {"folds together": one.pooled[split]} if split in one.pooled else {}
            print_columns(columns, f"{head}baseline {name}, {split}")
    return {name: vars(one) for name, one in results.items()}


def _one_each(fitted: Mapping[str, Baseline], head: str, *, show: bool) -> dict[str, Any]:
    """The scores of each baseline by name and split."""
    results = {
        name: {split: scores[one.task.name] for split, scores in one.scores.items()} for name, one in fitted.items()
    }
    for split in ("valid", "test") if show else ():
        print_metrics({f"{head}{split}": {name: scores[split] for name, scores in results.items()}})
    return results
