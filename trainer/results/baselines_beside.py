"""The baselines that lie beside a run, in the same folder, and were fitted on its data: their scores beside the run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.results.run_folder import RunFolder, read_run
from trainer.results.task_results import BaselineScores, TaskResults
from trainer.run.record import RECORD


def add_baselines(run: RunFolder, results: Sequence[TaskResults]) -> None:
    """Put the scores of baselines of the run's data (fingerprint) beside those of the run, by task.

    Beside a run of a fold stand the baselines of that fold. Nothing is added to a baseline. ``run.notes`` gets a line for each
    that cannot be read, and one where there are baselines of other folds only.
    """
    if run.is_baseline:
        return
    fingerprints = _fingerprints(run)
    found = [baseline for baseline in _beside(run) if fingerprints.items() & _fingerprints(baseline).items()]
    same_fold = [baseline for baseline in found if _fold(baseline) == _fold(run)]
    if found and not same_fold:
        of_run = "no fold" if _fold(run) is None else f"fold {_fold(run)}"
        run.notes.append(f"the baselines beside the run are not shown: none is of its fold, and the run is of {of_run}")
    for baseline in same_fold:
        assert baseline.baseline is not None
        if not baseline.results:
            run.notes.append(f"the baseline {baseline.path} cannot be shown: {'; '.join(baseline.notes)}")
        for result in results:
            name = result.task.name
            scores = {split: tasks[name] for split, tasks in baseline.results.items() if name in tasks}
            if scores and name in fingerprints and _fingerprints(baseline).get(name) == fingerprints[name]:
                result.baselines.append(BaselineScores(baseline.baseline["name"], baseline.name, scores))


def _beside(run: RunFolder) -> list[RunFolder]:
    """The finished baselines in the folder that holds the run's, by name."""
    parent = run.path.absolute().parent
    paths = [path for path in sorted(parent.iterdir()) if (path / RECORD).is_file()]
    paths = [path for path in paths if not (path / "config.yaml").is_file()]  # which runs have: most need not be read
    folders = [read_run(path, predictions=False) for path in paths]
    return [one for one in folders if one.is_baseline and one.record.get("state") == "done"]


def _fold(run: RunFolder) -> str | None:
    """The fold that was tested; None where there are none."""
    fold = run.record.get("fold")
    return None if fold is None else fold["name"]


def _fingerprints(run: RunFolder) -> dict[str, str]:
    """Task -> fingerprint of its data; empty where the record does not have them."""
    data = run.record.get("data")
    return {name: str(value) for name, value in data.items()} if isinstance(data, Mapping) else {}
