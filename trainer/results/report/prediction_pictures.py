"""Pictures of a task's predictions: confusion, residuals, calibration, robustness.

Every function returns None where there is nothing to show. `end` ends the pictures' names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from trainer.answers.scores import TaskScores
from trainer.results.printable import format_metric, printable
from trainer.results.report.drawing import (
    BLUE,
    MUTED,
    ORANGE,
    SERIES,
    SIZE,
    Names,
    Picture,
    axes,
    heat_map,
    render,
)
from trainer.results.report.gate_pictures import gate_pictures
from trainer.results.task_results import TaskResults

WRITTEN = 15  # classes up to which a confusion matrix has its numbers written into its cells
VECTORS = 1500  # points up to which a scatter plot is drawn as vectors


def task_pictures(results: TaskResults, several: bool) -> list[Picture]:
    """All pictures of one task; with `several` tasks the names of the pictures end in the task's."""
    end = f"-{results.task.name}" if several else ""
    made: list[Picture | None] = []
    if results.task.kind == "classification":
        made += [confusion(results, end, share=False), confusion(results, end, share=True), reliability(results, end)]
    elif results.task.kind == "regression":
        made += [scatter(results, end), residuals(results, end), coverage(results, end)]
    made += [*gate_pictures(results, end), robustness(results, end)]
    return [p for p in made if p]


def confusion(results: TaskResults, end: str, *, share: bool) -> Picture | None:
    """The confusion matrix: counts, or with `share` the share of each true class."""
    confused = results.split_scores.get("confusion")
    if not confused:
        return None
    labels, counts = confused["labels"], np.array(confused["matrix"])
    answers = list(labels)
    if sum(confused["invalid"]):
        counts, answers = np.hstack([counts, np.array(confused["invalid"])[:, None]]), [*labels, "invalid"]
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    width = min(9.0, max(SIZE[0], 0.52 * len(answers) + 1.2))

    def draw(figure: Figure, names: Names) -> None:
        ax = figure.add_subplot()
        texts = [[f"{v:.2f}" if share else str(v) for v in row] for row in (shares if share else counts)]
        strength = shares if share else counts / max(1, counts.max())
        columns, rows = [names(answer) for answer in answers], [names(label) for label in labels]
        heat_map(ax, strength, texts, columns, rows, write=len(labels) <= WRITTEN)
        ax.set_xlabel("answer")
        ax.set_ylabel("truth")

    wrong = [(int(counts[i, j]), labels[i], answers[j]) for i, j in np.ndindex(counts.shape) if i != j and counts[i, j]]
    most = "; ".join(f"{n} of {a} answered as {b}" for n, a, b in sorted(wrong, reverse=True)[:3]) or "none"
    alt = f"Confusion matrix of {results.task.name}, {results.split}: rows truth, columns answers. Most frequent mistakes: {most}."
    if share:
        return render(
            f"confusion-shares{end}", "Confusion, share of each class", draw, alt=alt, labels=labels, size=(width, 0.68 * width),
            caption="Rows sum to 1." + (" A class without samples has a row of zeros." if (support == 0).any() else ""),
        )  # fmt: skip
    return render(f"confusion{end}", "Confusion, counts", draw, alt=alt, labels=labels, size=(width, 0.68 * width))


def scatter(results: TaskResults, end: str) -> Picture | None:
    truth, guess = _pairs(results)
    if not len(truth):
        return None

    def draw(figure: Figure, names: Names) -> None:
        ax = axes(figure, "truth", "prediction")
        both = np.concatenate([truth, guess])
        ends = [both.min(), both.max()]
        ax.plot(ends, ends, color=MUTED, linewidth=1, linestyle="--", label="equal")
        few = len(truth) <= VECTORS
        size = 12 if few else 5
        ax.scatter(truth, guess, s=size, color=BLUE, alpha=0.5, linewidths=0, rasterized=not few, label="samples")
        ax.legend(loc="upper left")

    listed = _listed(results.split_scores, ("mae", "corr"))
    alt = f"Prediction against truth of {len(truth)} samples of {results.task.name}, {results.split}: {listed}."
    return render(f"scatter{end}", "Truth and prediction", draw, alt=alt)


def residuals(results: TaskResults, end: str) -> Picture | None:
    truth, guess = _pairs(results)
    if not len(truth):
        return None
    error = guess - truth

    def draw(figure: Figure, names: Names) -> None:
        ax = axes(figure, "prediction - truth", "samples")
        ax.hist(error, bins=min(40, max(8, len(error) // 12)), color=BLUE, alpha=0.6)
        ax.axvline(0, color=MUTED, linewidth=1)
        ax.axvline(float(error.mean()), color=ORANGE, linestyle="--", label=f"mean {error.mean():+.3f}")
        ax.legend(loc="upper right")

    low, mid, high = np.percentile(error, [5, 50, 95])
    alt = f"Residuals: mean {error.mean():+.3f}, median {mid:+.3f}, 90 percent between {low:+.3f} and {high:+.3f}."
    return render(f"residuals{end}", "Residuals", draw, alt=alt)


def reliability(results: TaskResults, end: str) -> Picture | None:
    """Reliability diagram: accuracy by the probability given, as given and at the fitted temperature."""
    rows = [row for row in results.reliability or [] if row["n"]]
    if not rows:
        return None
    ece = results.split_scores.get("ece")
    fitted = results.calibration
    after = fitted.bins.get(results.split or "", []) if fitted else []

    def draw(figure: Figure, names: Names) -> None:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
        for row in rows:
            box = {"width": row["high"] - row["low"], "align": "edge", "color": BLUE, "edgecolor": "none"}
            top.bar(row["low"], row["accuracy"], alpha=0.35, **box)
            below.bar(row["low"], row["n"], alpha=0.6, **box)
        points = [(row["confidence"], row["accuracy"]) for row in rows]
        top.plot(*zip(*points, strict=True), "o", color=BLUE, markersize=4, label="as given")
        if fitted and (points := [(row["confidence"], row["accuracy"]) for row in after if row["n"]]):
            tempered = f"at temperature {fitted.temperature:.2f}"
            top.plot(*zip(*points, strict=True), "x", color=ORANGE, markersize=5, label=tempered)
        top.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="accuracy")
        below.set(xlabel="probability of the answer", ylabel="samples")
        top.legend(loc="upper left")

    listed = "; ".join(f"at {row['confidence']:.2f} {row['accuracy']:.2f} ({row['n']})" for row in rows)
    summary = "" if ece is None else f" Expected calibration error (ECE) {ece:.4f}"
    if fitted and summary and results.split in fitted.splits:
        calibrated = format_metric(fitted.splits[results.split]["ece_calibrated"])
        summary += f", {calibrated} at the temperature {fitted.temperature:.3f} that was fitted on {fitted.fitted_on}"
    summary += "." if summary else ""
    return render(
        f"calibration{end}", "Calibration", draw,
        alt=f"How often answers are right, by the probability given to them (samples): {listed}.{summary}",
        caption=f"A calibrated model lies on the dashed line.{summary}",
    )  # fmt: skip


def robustness(results: TaskResults, end: str) -> Picture | None:
    """The selecting metric by the rate of damage, a panel for each mode."""
    found = results.robustness
    if found is None:
        return None
    metric, curves, level = found.measured["metric"], found.measured["curves"], found.measured["reference"]
    modes = list(dict.fromkeys(curve["mode"] for curve in curves))

    def draw(figure: Figure, names: Names) -> None:
        for ax, mode in zip(np.atleast_1d(figure.subplots(1, len(modes), sharey=True)), modes, strict=True):
            of_mode = [curve for curve in curves if curve["mode"] == mode]
            for curve, colour, mark in zip(of_mode, SERIES, "os^DvP", strict=False):
                points = [(p["rate"], p["scores"].get(metric)) for p in curve["points"]]
                points = [(rate, score) for rate, score in points if score is not None]
                ax.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=3.5, label=curve["modality"])
            if level is not None:
                ax.axhline(level, color=MUTED, linestyle="--", linewidth=1, label=printable(str(found.run)))
            ax.set(title=mode, xlabel="rate")
        figure.axes[0].set_ylabel(metric)
        lines = figure.axes[-1].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4)

    listed = "; ".join(
        f"{c['modality']} {c['mode']}: "
        + ", ".join(f"{format_metric(p['scores'].get(metric))} at {p['rate']:g}" for p in c["points"])
        for c in curves
    )
    reference = "" if level is None else f" Dashed: {found.run}, {level:.4f}."
    return render(
        f"robustness{end}", "Missing and corrupted modalities", draw, alt=f"{metric} by rate of damage on {found.split}: {listed}.{reference}",
        caption="Rate: of samples that lack the modality (missing), of frames with noise (noise) or dropped (frames)." + reference,
        size=(max(SIZE[0], 2.6 * len(modes)), SIZE[1]),
    )  # fmt: skip


def coverage(results: TaskResults, end: str) -> Picture | None:
    points = results.coverage
    if not points:
        return None

    def draw(figure: Figure, names: Names) -> None:
        ax = axes(figure, "quantile of the predicted distribution", "share of truths below")
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
        ax.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3.5, label="model")
        ax.set(xlim=(0, 1), ylim=(0, 1.03))
        ax.legend(loc="upper left")

    gap = float(np.mean([abs(share - q) for q, share in points]))
    return render(
        f"calibration{end}", "Calibration", draw,
        alt=f"Share of truths below each quantile of the predicted distribution; mean distance from calibrated {gap:.3f}.",
        caption=f"A calibrated model lies on the dashed line; mean distance {gap:.3f}.",
    )  # fmt: skip


def _pairs(results: TaskResults) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of the valid answers."""
    if results.rows is None:
        return np.empty(0), np.empty(0)
    rows = results.rows[results.rows["valid"]]
    return rows["target"].to_numpy(float), rows["value"].to_numpy(float)


def _listed(scores: TaskScores, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {format_metric(scores.get(name))}" for name in names)
