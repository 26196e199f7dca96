"""Which folds a sweep trains: those of ``--folds``, looked up in the prepared datasets of its variants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.config import RunConfig
from trainer.data.folds import find_fold
from trainer.data.preparation.folder import read_record
from trainer.questions import tasks_of_run

ALL_FOLDS = "all"  # what --folds means without a value


def chosen_folds(text: str | None, variants: Mapping[str, RunConfig]) -> tuple[str, ...]:
    """The names of the folds that ``--folds`` asks for: all, or names and numbers from 1 with commas between them.

    None is the option left out: there are no folds to train, and datasets that have some are a fault.

    Raises:
        ValueError: a dataset that is not there, has no folds or other folds than the rest; no such fold, one given twice, or
            one that the config names too. All faults in one message.
    """
    if text is None:
        _check_unfolded(variants)
        return ()
    faults: dict[str, None] = {}
    found: dict[tuple[str, ...], str] = {}
    for name, config in variants.items():
        if config.data.fold is not None:
            faults[f"{f'{name}: ' if name else ''}data.fold={config.data.fold} and --folds name the fold twice"] = None
        for path in _datasets(config):
            record = read_record(path)
            if record is None:
                faults[
                    f"{path} is not a prepared dataset: --folds needs it to know the folds; make it with egmf prepare"
                ] = None
            elif "folds" not in record:
                faults[
                    f"{path} was prepared without folds: prepare it again from samples with a fold, or name their column with "
                    "--fold-column (docs/data.md)"
                ] = None
            else:
                found.setdefault(tuple(record["folds"]), str(path))
    if len(found) > 1:
        listed = "; ".join(f"{path}: {', '.join(names)}" for names, path in found.items())
        faults[f"the datasets have different folds: {listed}"] = None
    if faults:
        raise ValueError("\n".join(faults))
    (names,) = found
    if text == ALL_FOLDS:
        return names
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        try:
            chosen.append(find_fold(part, names))
        except ValueError as error:
            faults[f"--folds {text}: {error}"] = None
    if len(set(chosen)) < len(chosen):
        faults[f"--folds {text}: names a fold twice"] = None
    if faults:
        raise ValueError("\n".join(faults))
    return tuple(chosen)


def _check_unfolded(variants: Mapping[str, RunConfig]) -> None:
    faults: dict[str, None] = {}
    for config in variants.values():
        for path in _datasets(config) if config.data.fold is None else ():
            record = read_record(path)
            if record is not None and "folds" in record:
                faults[
                    f"{path} has folds ({', '.join(record['folds'])}) and no splits: add --folds to train a run for each, or choose one "
                    f"with data.fold={next(iter(record['folds']))}"
                ] = None
    if faults:
        raise ValueError("\n".join(faults))


def _datasets(config: RunConfig) -> list[Path]:
    return [Path(path) for path in dict.fromkeys(one.path(config.data.path) for one in tasks_of_run(config.tasks))]
