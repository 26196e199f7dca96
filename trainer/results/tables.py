"""A run's tables as text: its page and the terminal show the same ones."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from trainer.results.printable import Table, format_metric
from trainer.results.run_folder import SPLITS, RunFolder
from trainer.results.runs import last_sign, parse_time, state_of, steps_text
from trainer.results.task_results import Example, GateGroup, Robustness, TaskResults
from trainer.run.expert_load import DEAD

MARKS = ("train/skipped", "train/spike", "train/overflow")  # metrics that mark a step rather than measure it


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """What a run is, in a few lines."""
    started, ended = parse_time(run.record.get("started")), parse_time(run.record.get("ended"))
    lines = [("state", str(state_of(run))), ("task", ", ".join(run.tasks) or "unknown")]
    if (made := run.baseline) is not None:
        lines.append(("baseline", f"{made['model']} of {', '.join(made['modalities']) or 'nothing'}, no EGMF run"))
    else:
        lines += [("step", steps_text(run.step, run.steps)), ("checkpoint", run.checkpoint or "none chosen yet")]
    lines += [
        ("started", _utc(started) if started else "unknown"),
    ]
    if ended and started:
        lines.append(("ended", f"{_utc(ended)}, after {ended - started}"))
    elif seen := last_sign(run):
        lines.append(("last active", _utc(seen)))
    return lines


def scores(results: TaskResults) -> Table | None:
    """Every metric on every split, the constant answer's and those of baselines beside them."""
    splits = [split for split in SPLITS if split in results.scores]
    if not splits:
        return None
    constant = results.constant_scores
    names = dict.fromkeys(
        name
        for split in splits
        for name, value in results.scores[split].items()
        if value is None or isinstance(value, (int, float))
    )
    heads = [f"constant answer, {results.split}"] if constant else []
    beside = [constant] if constant else []
    split = results.split or splits[0]  # before there are predictions, the split of the final scores
    for baseline in results.baselines:
        if split in baseline.scores:
            heads.append(f"baseline {baseline.name}, {split}")
            beside.append(baseline.scores[split])
    table = Table(f"Scores of {results.task.name}", ["metric", *splits, *heads])
    for name in names:
        columns = [results.scores[split] for split in splits] + beside
        cells = [format_metric(values.get(name)) if name in values else "" for values in columns]
        table.rows.append([f"{name} (selects)" if name == results.task.select else name, *cells])
    notes = [f"The constant answer is the {results.constant}."] if results.constant else []
    if folders := [baseline.folder for baseline in results.baselines if split in baseline.scores]:
        notes.append(
            f"Baselines of the same data lie beside the run: {', '.join(folders)}; egmf compare tests the differences."
        )
    table.note = " ".join(notes)
    return table


def per_class(results: TaskResults) -> Table | None:
    classes = results.split_scores.get("per_class")
    if not classes:
        return None
    table = Table(f"Classes of {results.task.name}, {results.split}", ["class", "precision", "recall", "F1", "support"])
    for label, values in classes.items():
        numbers = (values.get(name) for name in ("precision", "recall", "f1", "support"))
        table.rows.append([label, *map(format_metric, numbers)])
    return table


def confusion(results: TaskResults) -> Table | None:
    counts = results.split_scores.get("confusion")
    if not counts:
        return None
    invalid = counts["invalid"] if sum(counts["invalid"]) else None
    heads = ["truth \\ answer", *counts["labels"], *(["invalid"] if invalid else [])]
    table = Table(f"Confusion of {results.task.name}, {results.split}", heads, note="Counts.")
    for i, (label, row) in enumerate(zip(counts["labels"], counts["matrix"], strict=True)):
        table.rows.append([label, *map(str, row), *([str(invalid[i])] if invalid else [])])
    return table


def calibration(results: TaskResults) -> Table | None:
    """How often answers are right, by the probability given to them; of regressions the coverage of quantiles."""
    title = f"Calibration of {results.task.name}, {results.split}"
    if results.reliability:
        table = Table(title, ["probability", "samples", "mean probability", "accuracy"])
        for row in results.reliability:
            if row["n"]:
                cells = (str(row["n"]), format_metric(row["confidence"]), format_metric(row["accuracy"]))
                table.rows.append([f"{row['low']:.3f} to {row['high']:.3f}", *cells])
        ece = results.split_scores.get("ece")
        table.note = f"Expected calibration error (ECE): {format_metric(ece)}."
        return table
    if results.coverage:
        table = Table(title, ["quantile predicted", "share of truths below"])
        table.rows = [[f"{q:.2f}", format_metric(share)] for q, share in results.coverage]
        return table
    return None


def temperature(results: TaskResults) -> Table | None:
    """The effect of the temperature fitted on validation, on every split."""
    fitted = results.calibration
    if fitted is None:
        return None
    names = ["n", "nll", "nll_calibrated", *(["ece", "ece_calibrated"] if fitted.edges else [])]
    heads = [name.replace("_calibrated", ", tempered") for name in names]
    table = Table(f"Temperature of {results.task.name}", ["split", *heads])
    table.rows = [[split, *(format_metric(values[n]) for n in names)] for split, values in fitted.splits.items()]
    limit = ", the end of the range that was searched" if fitted.at_limit else ""
    edges = f" ECE over {len(fitted.edges) - 1} bins of equal width between 0 and 1." if fitted.edges else ""
    kept = "no predicted label changes" if fitted.edges else "predicted numbers are expectations at temperature 1"
    table.note = (
        f"T = {fitted.temperature:.3f}{limit}: probabilities in proportion to p^(1/T), T fitted on the {fitted.n} samples of "
        f"{fitted.fitted_on} by nll, on no other split; {kept}.{edges}"
    )
    return table


def balance(results: TaskResults) -> Table | None:
    """How the gate shares its weight among the experts, by split."""
    if not results.balance:
        return None
    experts = list(next(iter(results.balance.values())).mean)
    table = Table(
        f"Load of the experts of {results.task.name}",
        ["split", *experts, *(f"{e}, largest" for e in experts), "coefficient of variation"],
    )
    for split, load in results.balance.items():
        cells = (*load.mean.values(), *load.largest.values(), load.variation)
        table.rows.append([split, *(format_metric(x) for x in cells)])
    table.note = (
        f"Mean weights. An expert counts as dead if its mean is below {DEAD:g}, or no sample gives it more than "
        f"1 / (4 x experts) = {1 / (4 * len(experts)):.3f}."
    )
    return table


def robustness(task: str, found: Robustness) -> Table:
    """The selecting metric of a task with modalities missing or corrupted, by rate."""
    metric, curves, reference = found.measured["metric"], found.measured["curves"], found.measured["reference"]
    rates = [point["rate"] for point in curves[0]["points"]]
    table = Table(
        f"Missing and corrupted modalities, {task} {metric}, {found.split}",
        ["damage", *(f"rate {rate:g}" for rate in rates)],
    )
    for curve in curves:
        cells = []
        for point in curve["points"]:
            worse = point["against"] is not None and point["against"]["worse"]
            cells.append(format_metric(point["scores"].get(metric)) + (" *" if worse else ""))
        table.rows.append([f"{curve['modality']} {curve['mode']}", *cells])
    if reference is not None:
        table.note = (
            f"{found.run} scores {format_metric(reference)}. *: worse than it by more than noise (the 95 % interval "
            "of the difference, by bootstrap over samples, lies on the worse side of 0)."
        )
    return table


def gates(results: TaskResults) -> Iterator[Table]:
    """Gate weights by expert and modality, and by every group."""
    if results.gates is None:
        return
    everything = results.gates.all
    modalities = list(everything.modality)
    table = Table(
        f"Gate weights of {results.task.name}, {results.split}",
        ["expert", "weight", *(f"{m} inside" for m in modalities)],
    )
    for expert, weight in everything.expert.items():
        inside = results.gates.inside[expert]
        table.rows.append([expert, format_metric(weight), *(format_metric(inside[m]) for m in modalities)])
    yield table
    for by, groups in results.gates.groups.items():
        word = "sign" if by == "class" and results.task.kind == "regression" else by
        table = Table(f"Gate weights by {word}", [word, "samples", *everything.expert, *modalities])
        table.rows = [_group_row(group) for group in [*groups, everything]]
        yield table


def task_details(results: TaskResults) -> list[Table]:
    """The tables of a task that follow its scores and classes: confusion, calibration, gates, experts' load, robustness."""
    found = [confusion(results), calibration(results), temperature(results), *gates(results), balance(results)]
    if results.robustness is not None:
        found.append(robustness(results.task.name, results.robustness))
    return [table for table in found if table]


def training(run: RunFolder) -> Table | None:
    """First, last, lowest and highest value of every training metric."""
    table = Table("Training", ["", "first", "last", "lowest", "highest"])
    for name, series in run.journal.items():
        if name.startswith(("train/", "gate/")) and name not in MARKS and series:
            values = [value for _, value in series]
            table.rows.append([name, *(f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values)))])
    skipped, spikes, overflows = (sum(bool(value) for _, value in run.journal.get(name, [])) for name in MARKS)
    table.note = f"Steps skipped: {skipped}; spikes of the loss: {spikes}."
    if overflows:
        table.note += f" Steps that overflowed at the loss scale of fp16, and moved nothing: {overflows}."
    return table if table.rows else None


def validation(run: RunFolder) -> Table | None:
    """The selecting metric of every task at every validation."""
    series = {task: dict(values) for task, values in run.selected().items()}
    if not series:
        return None
    table = Table("Validation", ["step", *(f"{task} {run.tasks[task].select}" for task in series), "chosen"])
    for step in sorted(set().union(*series.values())):
        cells = [format_metric(values.get(step)) for values in series.values()]
        table.rows.append([str(step), *cells, "chosen" if step == run.chosen_step else ""])
    return table


def environment(run: RunFolder) -> Table | None:
    """What the run ran on, and with what."""
    record = run.record
    git = record.get("git") or {}
    tracked: dict[str, object] = {**(record.get("mlflow") or {})}
    fold = record.get("fold")
    commit = str(git["commit"]) + (" and local changes" if git.get("changed") else "") if git.get("commit") else None
    rows: dict[str, object] = {
        "device": record.get("device"),
        "world": record.get("world"),
        "zero": record.get("zero"),
        "precision": record.get("precision"),
        "seed": record.get("seed"),
        "fold": f"{fold['name']} of {', '.join(fold['names'])}" if fold else None,
        "platform": record.get("platform"),
        "base": record.get("base"),
        "git": commit,
        "command": " ".join(map(str, record["command"])) if record.get("command") else None,
        **{f"data {task}": fingerprint for task, fingerprint in (record.get("data") or {}).items()},
        **{f"recipe {task}": recipe["hash"] for task, recipe in (record.get("recipe") or {}).items()},
        **{f"{name} version": version for name, version in (record.get("versions") or {}).items()},
        **{f"MLflow {key}": tracked.get(key) for key in ("uri", "run_id")},
    }
    table = Table("Environment", ["", ""], words=True)
    table.rows = [[key, str(value)] for key, value in rows.items() if value is not None]
    return table if table.rows else None


def example_lines(example: Example) -> list[tuple[str, str]]:
    """An example as labelled lines; what it lacks is left out."""
    lines = [("truth", _answer(example.label)), ("answer", _predicted(example))]
    if example.probabilities:
        lines.append(("probabilities", ", ".join(f"{answer} {p:.3f}" for answer, p in example.probabilities)))
    for name, weights in (("experts", example.expert), ("modalities", example.modality)):
        if weights:
            lines.append((name, ", ".join(f"{key} {w:.3f}" for key, w in weights.items())))
    if example.kind:
        lines.append(("kind", example.kind))
    return lines


def _predicted(example: Example) -> str:
    if not example.valid:
        return f"invalid: {example.answer!r}" if example.answer is not None else "invalid"
    text = _answer(example.prediction)
    return text if isinstance(example.label, float) or example.label == example.prediction else f"{text} (wrong)"


def _answer(value: str | float | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _group_row(group: GateGroup) -> list[str]:
    return [group.name, str(group.n), *map(format_metric, (*group.expert.values(), *group.modality.values()))]


def _utc(time: datetime.datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
