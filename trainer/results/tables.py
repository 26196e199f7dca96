"""The tables of a run, as text: the page and the terminal show the same ones."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.results.run_folder import SPLITS, RunFolder
from trainer.results.runs import last_sign, state_of, steps_text
from trainer.run.expert_load import DEAD

if TYPE_CHECKING:
    from trainer.results.analysis import Example, GateGroup, TaskResults

ENVIRONMENT = ("device", "world", "zero", "precision", "seed", "platform", "base")


@dataclass
class Table:
    """A table of text. The first column names the rows; the others are numbers unless `words` is true."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""
    words: bool = False


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """What a run is, in a few lines."""
    record = run.record
    started, ended = (_moment(record.get(key)) for key in ("started", "ended"))
    seen = last_sign(run)
    lines = [
        ("state", str(state_of(run))),
        ("task", ", ".join(run.tasks) or "unknown"),
        ("step", steps_text(run.step, run.steps)),
    ]
    lines.append(("checkpoint", run.checkpoint or "none chosen yet"))
    lines.append(("started", f"{started:%Y-%m-%d %H:%M:%S} UTC" if started else "unknown"))
    if ended and started:
        lines.append(("ended", f"{ended:%Y-%m-%d %H:%M:%S} UTC, after {ended - started}"))
    elif seen:
        lines.append(("last sign", f"{seen:%Y-%m-%d %H:%M:%S} UTC"))
    return lines


def scores(results: TaskResults) -> Table | None:
    """Every metric on every split, the constant answer's beside them."""
    splits = [split for split in SPLITS if split in results.scores]
    if not splits:
        return None
    constant = results.constant_scores
    shown = dict.fromkeys(
        k for s in splits for k, v in results.scores[s].items() if v is None or isinstance(v, (int, float))
    )
    heads = [f"constant answer, {results.split}"] if constant else []
    table = Table(f"Scores of {results.task.name}", ["metric", *splits, *heads])
    for name in shown:
        cells = [number(results.scores[s].get(name)) if name in results.scores[s] else "" for s in splits]
        if constant:
            cells.append(number(constant[name]) if name in constant else "")
        table.rows.append([f"{name} (selects)" if name == results.task.select else name, *cells])
    if results.constant:
        table.note = f"The constant answer is the {results.constant}."
    return table


def per_class(results: TaskResults) -> Table | None:
    held = results.scores.get(results.split or "", {}).get("per_class")
    if not held:
        return None
    columns = ("precision", "recall", "f1", "support")
    table = Table(f"Classes of {results.task.name}, {results.split}", ["class", "precision", "recall", "F1", "support"])
    table.rows = [[label, *(number(values.get(c)) for c in columns)] for label, values in held.items()]
    return table


def confusion(results: TaskResults) -> Table | None:
    held = results.scores.get(results.split or "", {}).get("confusion")
    if not held:
        return None
    invalid = held["invalid"] if sum(held["invalid"]) else None
    table = Table(
        f"Confusion of {results.task.name}, {results.split}", ["truth \\ answer", *held["labels"], *(["invalid"] if invalid else [])],
        note="Counts.",
    )  # fmt: skip
    for i, (label, row) in enumerate(zip(held["labels"], held["matrix"], strict=True)):
        table.rows.append([label, *map(str, row), *([str(invalid[i])] if invalid else [])])
    return table


def calibration(results: TaskResults) -> Table | None:
    if results.reliability:
        ece = results.scores.get(results.split or "", {}).get("ece")
        table = Table(
            f"Calibration of {results.task.name}, {results.split}",
            ["probability", "samples", "mean probability", "accuracy"],
        )
        for row in results.reliability:
            if row["n"]:
                cells = (str(row["n"]), number(row["confidence"]), number(row["accuracy"]))
                table.rows.append([f"{row['low']:.3f} to {row['high']:.3f}", *cells])
        table.note = f"Expected calibration error (ECE): {number(ece)}."
        return table
    if results.coverage:
        table = Table(
            f"Calibration of {results.task.name}, {results.split}", ["quantile predicted", "share of truths below"]
        )
        table.rows = [[f"{q:.2f}", number(share)] for q, share in results.coverage]
        return table
    return None


def temperature(results: TaskResults) -> Table | None:
    """What the temperature fitted on validation does on every split."""
    held = results.calibration
    if held is None:
        return None
    names = ["n", "nll", "nll_calibrated", *(["ece", "ece_calibrated"] if held.edges else [])]
    table = Table(
        f"Temperature of {results.task.name}", ["split", *(n.replace("_calibrated", ", tempered") for n in names)]
    )
    table.rows = [[split, *(number(values[n]) for n in names)] for split, values in held.splits.items()]
    limit = ", the end of the range that was searched" if held.at_limit else ""
    edges = f" ECE over {len(held.edges) - 1} bins of equal width between 0 and 1." if held.edges else ""
    kept = "no predicted label changes" if held.edges else "predicted numbers are expectations at temperature 1"
    table.note = (
        f"T = {held.temperature:.3f}{limit}: probabilities in proportion to p^(1/T), T fitted on the {held.n} samples of "
        f"{held.fitted_on} by nll, on no other split; {kept}.{edges}"
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
    for split, held in results.balance.items():
        cells = (*held.mean.values(), *held.largest.values(), held.variation)
        table.rows.append([split, *(number(x) for x in cells)])
    table.note = (
        f"Mean weights. An expert counts as dead if its mean is below {DEAD:g}, or no sample gives it more than "
        f"1 / (4 x experts) = {1 / (4 * len(experts)):.3f}."
    )
    return table


def robustness(results: TaskResults) -> Table | None:
    """The selecting metric with modalities missing or corrupted, by rate."""
    held = results.robustness
    if not held:
        return None
    rates = [point["rate"] for point in held["curves"][0]["points"]]
    table = Table(
        f"Missing and corrupted modalities, {results.task.name} {held['metric']}, {held['split']}",
        ["damage", *(f"rate {rate:g}" for rate in rates)],
    )
    for curve in held["curves"]:
        cells = []
        for point in curve["points"]:
            worse = point["against"] is not None and point["against"]["worse"]
            cells.append(number(point["scores"].get(held["metric"])) + (" *" if worse else ""))
        table.rows.append([f"{curve['modality']} {curve['mode']}", *cells])
    if held["reference"] is not None:
        table.note = (
            f"{held['run']} scores {number(held['reference'])}. *: worse than it by more than noise (the 95 % interval "
            "of the difference, by bootstrap over samples, lies on the worse side of 0)."
        )
    return table


def gates(results: TaskResults) -> list[Table]:
    """Gate weights by expert and modality, and by every group."""
    held = results.gates
    if held is None:
        return []
    modalities = list(held.all.modality)
    inside = Table(
        f"Gate weights of {results.task.name}, {results.split}",
        ["expert", "weight", *(f"{m} inside" for m in modalities)],
    )
    for expert, weight in held.all.expert.items():
        inside.rows.append([expert, number(weight), *(number(held.inside[expert][m]) for m in modalities)])
    made = [inside]
    for by, groups in held.groups.items():
        word = "sign" if by == "class" and results.task.kind == "regression" else by
        table = Table(f"Gate weights by {word}", [word, "samples", *held.all.expert, *modalities])
        table.rows = [_group_row(group) for group in [*groups, held.all]]
        made.append(table)
    return made


def training(run: RunFolder) -> Table | None:
    """The first, the last and the lowest of what the training told."""
    table = Table("Training", ["", "first", "last", "lowest", "highest"])
    for name, series in run.journal.items():
        if name.startswith(("train/", "gate/")) and name not in ("train/skipped", "train/spike") and series:
            values = [value for _, value in series]
            table.rows.append([name, *(f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values)))])
    marks = {name: sum(bool(v) for _, v in run.journal.get(f"train/{name}", [])) for name in ("skipped", "spike")}
    table.note = f"Steps skipped: {marks['skipped']}; spikes of the loss: {marks['spike']}."
    return table if table.rows else None


def validation(run: RunFolder) -> Table | None:
    """The selecting metric of every task at every validation."""
    series = {task: dict(values) for task, values in run.selected().items()}
    if not series:
        return None
    table = Table("Validation", ["step", *(f"{task} {run.tasks[task].select}" for task in series), "chosen"])
    for step in sorted(set().union(*series.values())):
        table.rows.append(
            [str(step), *(number(s.get(step)) for s in series.values()), "chosen" if step == run.chosen_step else ""]
        )
    return table


def environment(run: RunFolder) -> Table | None:
    """What the run ran on, with what."""
    record = run.record
    table = Table("Environment", ["", ""], words=True)
    rows: dict[str, Any] = {key: record.get(key) for key in ENVIRONMENT}
    git = record.get("git") or {}
    if git.get("commit"):
        rows["git"] = str(git["commit"]) + (" and local changes" if git.get("changed") else "")
    rows["command"] = " ".join(map(str, record["command"])) if record.get("command") else None
    rows |= {f"data {task}": fingerprint for task, fingerprint in (record.get("data") or {}).items()}
    rows |= {f"{name} version": version for name, version in (record.get("versions") or {}).items()}
    tracked = record.get("mlflow") or {}
    rows |= {f"MLflow {key}": tracked.get(key) for key in ("uri", "run_id")}
    table.rows = [[key, str(value)] for key, value in rows.items() if value is not None]
    return table if table.rows else None


def example_lines(example: Example) -> list[tuple[str, str]]:
    """An example as named lines; what it has none of is left out."""
    lines = [("truth", shown_value(example.label)), ("answer", _answered(example))]
    if example.probabilities:
        lines.append(("probabilities", ", ".join(f"{answer} {p:.3f}" for answer, p in example.probabilities)))
    for name, weights in (("experts", example.expert), ("modalities", example.modality)):
        if weights:
            lines.append((name, ", ".join(f"{key} {w:.3f}" for key, w in weights.items())))
    if example.kind:
        lines.append(("kind", example.kind))
    return lines


def _answered(example: Example) -> str:
    if not example.valid:
        return f"invalid: {example.answer!r}" if example.answer is not None else "invalid"
    shown = shown_value(example.prediction)
    return shown if isinstance(example.label, float) or example.label == example.prediction else f"{shown} (wrong)"


def shown_value(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def number(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _group_row(group: GateGroup) -> list[str]:
    return [group.name, str(group.n), *(number(w) for w in (*group.expert.values(), *group.modality.values()))]


def _moment(text: Any) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
