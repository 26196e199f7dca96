"""The pictures of a run: what the training told by step, and what the predictions of its tasks say.

Every function returns None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from trainer.results.analysis import TaskResults
from trainer.results.printable import printable
from trainer.results.report.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    SERIES,
    SIZE,
    Names,
    Picture,
    render,
)
from trainer.results.run_folder import RunFolder, Series
from trainer.results.tables import number

POINTS = 1200  # drawn of a curve; a longer one is drawn as means of as many steps
SMOOTHED = 60  # points from which on a curve is also shown smoothed
WRITTEN = 15  # classes up to which a confusion matrix has its numbers written in
VECTORS = 1500  # points up to which a scatter is drawn as vectors


def run_pictures(run: RunFolder) -> list[Picture]:
    """What the training told, by step."""
    return [p for p in (loss(run), learning_rate(run), validation(run), gradient_norm(run), gate_usage(run)) if p]


def task_pictures(results: TaskResults, several: bool) -> list[Picture]:
    """What the predictions of one task say; with `several` tasks the names of the pictures end in the task's."""
    end = f"-{results.task.name}" if several else ""
    made: list[Picture | None] = []
    if results.task.kind == "classification":
        made += [confusion(results, end, share=False), confusion(results, end, share=True), reliability(results, end)]
    else:
        made += [scatter(results, end), residuals(results, end), coverage(results, end)]
    made += [gate_experts(results, end), gate_modalities(results, end)]
    made += [gate_groups(results, end, by) for by in ("class", "kind")]
    made.append(robustness(results, end))
    return [p for p in made if p]


def loss(run: RunFolder) -> Picture | None:
    series = run.journal.get("train/loss")
    if not series:
        return None
    values = np.array([value for _, value in series])
    log = bool(values.min() > 0 and values.max() > 50 * values.min())
    skipped, spikes = marked(run, "train/skipped"), marked(run, "train/spike")

    def draw(figure: Figure, names: Names) -> None:
        ax = _axes(figure, "step", "loss" + (" (log)" if log else ""))
        steps, shown = thin(series)
        many = len(shown) > SMOOTHED
        ax.plot(
            steps, shown, color=BLUE, alpha=0.35 if many else 1.0, label="loss", marker="." if len(shown) == 1 else ""
        )
        if many:
            ax.plot(steps, pd.Series(shown).ewm(halflife=len(shown) / 60).mean(), color=BLUE, label="smoothed")
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        at = dict(series)
        bottom = ax.get_xaxis_transform()
        if spikes:
            known = [s for s in spikes if s in at]
            ax.plot(known, [at[s] for s in known], "^", color=ORANGE, label=f"spikes: {len(spikes)}")
        if skipped:
            ax.plot(
                skipped, [0.02] * len(skipped), "x", color=RED, transform=bottom, label=f"skipped steps: {len(skipped)}"
            )
        _mark_chosen(ax, run)
        ax.legend(loc="upper right")

    first, last = series[0], series[-1]
    alt = (
        f"Training loss by step: {first[1]:.4g} at step {first[0]}, {last[1]:.4g} at step {last[0]}, "
        f"lowest {values.min():.4g}; {len(skipped)} steps skipped, {len(spikes)} spikes."
    )
    caption = f"Each point is the mean of {-(-len(series) // POINTS)} logged steps." if len(series) > POINTS else ""
    return render("loss", "Training loss", draw, alt=alt, caption=caption)


def learning_rate(run: RunFolder) -> Picture | None:
    names = {"fusion": "train/lr_fusion", "backbone": "train/lr_backbone"}
    curves = {label: run.journal[name] for label, name in names.items() if run.journal.get(name)}
    return _curves("learning-rate", "Learning rate", curves, "learning rate")


def gradient_norm(run: RunFolder) -> Picture | None:
    series = run.journal.get("train/gradient_norm")
    clip = run.config.train.clip if run.config else 0.0
    return _curves(
        "gradient-norm", "Gradient norm", {"norm": series} if series else {}, "norm before clipping",
        level=(f"clipped at {clip:g}", clip) if clip else None,
    )  # fmt: skip


def gate_usage(run: RunFolder) -> Picture | None:
    curves = {name.removeprefix("gate/"): s for name, s in run.journal.items() if name.startswith("gate/") and s}
    return _curves(
        "gate-usage", "Gate weight of the experts during training", curves, "mean weight",
        caption="Exponential average over steps, all tasks and slots.",
    )  # fmt: skip


def validation(run: RunFolder) -> Picture | None:
    curves = {task: series for task, series in run.selected().items() if series}
    if not curves:
        return None
    labels = {task: f"{task} {run.tasks[task].select}" for task in curves}
    chosen = run.chosen_step

    def draw(figure: Figure, names: Names) -> None:
        ax = _axes(figure, "step", "selecting metric")
        for (task, series), colour in zip(curves.items(), SERIES * len(curves), strict=False):
            ax.plot(*zip(*series, strict=True), color=colour, marker="o", markersize=3.5, label=printable(labels[task]))
            if chosen in dict(series):
                ax.plot([chosen], [dict(series)[chosen]], "*", color=colour, markersize=12)
        _mark_chosen(ax, run)
        ax.legend(loc="best")

    told = [f"{labels[task]} {series[-1][1]:.4f} at step {series[-1][0]}" for task, series in curves.items()]
    said = "no checkpoint is chosen yet" if chosen is None else f"the checkpoint of step {chosen} is chosen"
    less = [task for task in curves if not run.tasks[task].maximise]
    caption = (
        "Less is better." if less and len(curves) == 1 else f"Less is better for {', '.join(less)}." if less else ""
    )
    alt = f"Selecting metric on the validation split by step: {'; '.join(told)}; {said}."
    return render("validation", "Validation", draw, alt=alt, caption=caption)


def confusion(results: TaskResults, end: str, *, share: bool) -> Picture | None:
    held = _scores(results).get("confusion")
    if not held:
        return None
    labels, counts = list(held["labels"]), np.array(held["matrix"])
    answers = list(labels)
    if sum(held["invalid"]):
        counts, answers = np.hstack([counts, np.array(held["invalid"])[:, None]]), [*labels, "invalid"]
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    width = min(9.0, max(SIZE[0], 0.52 * len(answers) + 1.2))

    def draw(figure: Figure, names: Names) -> None:
        ax = figure.add_subplot()
        shown = [[f"{v:.2f}" if share else str(v) for v in row] for row in (shares if share else counts)]
        strength = shares if share else counts / max(1, counts.max())
        heat(ax, strength, shown, [names(a) for a in answers], [names(a) for a in labels], write=len(labels) <= WRITTEN)
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
        ax = _axes(figure, "truth", "prediction")
        both = np.concatenate([truth, guess])
        ax.plot(
            [both.min(), both.max()], [both.min(), both.max()], color=MUTED, linewidth=1, linestyle="--", label="equal"
        )
        few = len(truth) <= VECTORS
        ax.scatter(
            truth, guess, s=12 if few else 5, color=BLUE, alpha=0.5, linewidths=0, rasterized=not few, label="samples"
        )
        ax.legend(loc="upper left")

    told = _said(_scores(results), ("mae", "corr"))
    alt = f"Prediction against truth of {len(truth)} samples of {results.task.name}, {results.split}: {told}."
    return render(f"scatter{end}", "Truth and prediction", draw, alt=alt)


def residuals(results: TaskResults, end: str) -> Picture | None:
    truth, guess = _pairs(results)
    if not len(truth):
        return None
    left = guess - truth

    def draw(figure: Figure, names: Names) -> None:
        ax = _axes(figure, "prediction - truth", "samples")
        ax.hist(left, bins=min(40, max(8, len(left) // 12)), color=BLUE, alpha=0.6)
        ax.axvline(0, color=MUTED, linewidth=1)
        ax.axvline(float(left.mean()), color=ORANGE, linestyle="--", label=f"mean {left.mean():+.3f}")
        ax.legend(loc="upper right")

    low, mid, high = np.percentile(left, [5, 50, 95])
    alt = f"Residuals: mean {left.mean():+.3f}, median {mid:+.3f}, 90 percent between {low:+.3f} and {high:+.3f}."
    return render(f"residuals{end}", "Residuals", draw, alt=alt)


def reliability(results: TaskResults, end: str) -> Picture | None:
    rows = [row for row in results.reliability or [] if row["n"]]
    if not rows:
        return None
    ece = _scores(results).get("ece")
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

    told = "; ".join(f"at {row['confidence']:.2f} {row['accuracy']:.2f} ({row['n']})" for row in rows)
    said = "" if ece is None else f" Expected calibration error (ECE) {ece:.4f}"
    if fitted and said and results.split in fitted.splits:
        ece = fitted.splits[results.split]["ece_calibrated"]
        said += f", {number(ece)} at the temperature {fitted.temperature:.3f} that was fitted on {fitted.fitted_on}"
    said += "." if said else ""
    return render(
        f"calibration{end}", "Calibration", draw,
        alt=f"How often answers are right, by the probability given to them (samples): {told}.{said}",
        caption=f"A calibrated model lies on the dashed line.{said}",
    )  # fmt: skip


def robustness(results: TaskResults, end: str) -> Picture | None:
    """The selecting metric by the rate of damage, a panel for each mode."""
    held = results.robustness
    if not held:
        return None
    metric, level = held["metric"], held["reference"]
    modes = list(dict.fromkeys(curve["mode"] for curve in held["curves"]))

    def draw(figure: Figure, names: Names) -> None:
        for ax, mode in zip(np.atleast_1d(figure.subplots(1, len(modes), sharey=True)), modes, strict=True):
            of_mode = [curve for curve in held["curves"] if curve["mode"] == mode]
            for curve, colour, mark in zip(of_mode, SERIES, "os^DvP", strict=False):
                points = [(p["rate"], p["scores"].get(metric)) for p in curve["points"]]
                points = [(rate, score) for rate, score in points if score is not None]
                ax.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=3.5, label=curve["modality"])
            if level is not None:
                ax.axhline(level, color=MUTED, linestyle="--", linewidth=1, label=printable(str(held["run"])))
            ax.set(title=mode, xlabel="rate")
        figure.axes[0].set_ylabel(metric)
        lines = figure.axes[-1].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4)

    told = "; ".join(
        f"{c['modality']} {c['mode']}: "
        + ", ".join(f"{number(p['scores'].get(metric))} at {p['rate']:g}" for p in c["points"])
        for c in held["curves"]
    )
    said = "" if level is None else f" Dashed: {held['run']}, {level:.4f}."
    return render(
        f"robustness{end}", "Missing and corrupted modalities", draw, alt=f"{metric} by rate of damage on {held['split']}: {told}.{said}",
        caption="Rate: of samples that lack the modality (missing), of frames with noise (noise) or dropped (frames)." + said,
        size=(max(SIZE[0], 2.6 * len(modes)), SIZE[1]),
    )  # fmt: skip


def coverage(results: TaskResults, end: str) -> Picture | None:
    points = results.coverage
    if not points:
        return None

    def draw(figure: Figure, names: Names) -> None:
        ax = _axes(figure, "quantile of the predicted distribution", "share of truths below")
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


def gate_experts(results: TaskResults, end: str) -> Picture | None:
    if results.gates is None:
        return None
    weights, means = results.gates.expert_NE, results.gates.all.expert

    def draw(figure: Figure, names: Names) -> None:
        ax = _axes(figure, "mean weight", None)
        low, high = np.percentile(weights, [5, 95], axis=0)
        center = np.array(list(means.values()))
        places = range(len(means))
        spread = np.clip([center - low, high - center], 0, None)
        ax.barh(places, center, 0.6, color=SERIES[: len(means)], alpha=0.5, xerr=spread, ecolor=INK, capsize=4)
        ax.set_yticks(places, [f"{name}\n{w:.3f}" for name, w in means.items()])
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.grid(False, axis="y")

    told = ", ".join(f"{name} {w:.3f}" for name, w in means.items())
    return render(
        f"gate-experts{end}", "Gate weights of the experts", draw, alt=f"Mean gate weights of the experts: {told}.",
        caption="The lines reach from the 5th to the 95th percentile of the samples.",
    )  # fmt: skip


def gate_modalities(results: TaskResults, end: str) -> Picture | None:
    if results.gates is None:
        return None
    inside = results.gates.inside
    modalities = list(results.gates.all.modality)
    table = np.array([[inside[e][m] for m in modalities] for e in inside])

    def draw(figure: Figure, names: Names) -> None:
        ax = figure.add_subplot()
        heat(ax, table, [[f"{v:.3f}" for v in row] for row in table], modalities, list(inside))
        ax.set_ylabel("expert")

    told = "; ".join(f"{e}: " + ", ".join(f"{m} {w:.3f}" for m, w in inside[e].items()) for e in inside)
    return render(
        f"gate-modalities{end}", "Gate weights of the modalities inside each expert", draw,
        alt=f"Mean weights of the modalities inside each expert: {told}.",
        caption="Rows sum to 1, less the share of samples for which an expert had nothing to look at.",
    )  # fmt: skip


def gate_groups(results: TaskResults, end: str, by: str) -> Picture | None:
    groups = results.gates.groups.get(by) if results.gates else None
    if not groups:
        return None
    columns = [*groups[0].expert, *groups[0].modality]
    table = np.array([[*group.expert.values(), *group.modality.values()] for group in groups])
    labels = [group.name for group in groups]
    word = "sign of the truth" if by == "class" and results.task.kind == "regression" else by
    height = max(SIZE[1], 0.33 * len(groups) + 1.1)

    def draw(figure: Figure, names: Names) -> None:
        ax = figure.add_subplot()
        heat(
            ax,
            table,
            [[f"{v:.2f}" for v in row] for row in table],
            columns,
            [f"{names(g.name)} ({g.n})" for g in groups],
        )
        ax.axvline(len(groups[0].expert), color=INK, linewidth=1.5)
        ax.set_ylabel(word)

    told = "; ".join(
        f"{g.name}: " + ", ".join(f"{k} {w:.2f}" for k, w in {**g.expert, **g.modality}.items()) for g in groups
    )
    return render(
        f"gate-{by}{end}", f"Gate weights by {word}", draw, alt=f"Mean gate weights by {word}: {told}.", labels=labels,
        caption="Left of the line the experts, right of it the modalities over all experts; samples in brackets.",
        size=(SIZE[0], height),
    )  # fmt: skip


def marked(run: RunFolder, name: str) -> list[int]:
    """The steps at which a marking metric is not 0."""
    return [step for step, value in run.journal.get(name, []) if value]


def thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; of a long series the means of as many neighbours as leave no more than POINTS."""
    steps, values = (np.array(column, dtype=float) for column in zip(*series, strict=True))
    size = -(-len(steps) // POINTS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def heat(
    ax: Axes,
    strength: np.ndarray,
    shown: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[str],
    write: bool = True,
) -> None:
    """A table whose cells are the bluer the stronger they are (0 to 1), with `shown` written in."""
    for i, j in np.ndindex(strength.shape):
        alpha = 0.55 * float(np.clip(strength[i, j], 0, 1))  # dark and light text stay readable on it
        ax.add_patch(Rectangle((j, i), 1, 1, facecolor=(BLUE, alpha), edgecolor=PAPER))
        if write:
            ax.text(j + 0.5, i + 0.5, shown[i][j], ha="center", va="center", fontsize=9 if len(columns) <= 8 else 7)
    long = max(map(len, columns)) * len(columns) > 48
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35 if long else 0, ha="right" if long else "center")
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    ax.tick_params(length=0)
    ax.grid(False)


def _curves(
    name: str,
    title: str,
    curves: dict[str, Series],
    ylabel: str,
    *,
    level: tuple[str, float] | None = None,
    caption: str = "",
) -> Picture | None:
    if not curves:
        return None

    def draw(figure: Figure, names: Names) -> None:
        ax = _axes(figure, "step", ylabel)
        for (label, series), colour in zip(curves.items(), SERIES * len(curves), strict=False):
            ax.plot(*thin(series), color=colour, label=printable(label), marker="." if len(series) == 1 else "")
        if level:
            ax.axhline(level[1], color=MUTED, linestyle="--", linewidth=1, label=level[0])
        ax.set_ylim(bottom=0)
        ax.legend(loc="best")

    told = [f"{k} {s[0][1]:.3g} at step {s[0][0]}, {s[-1][1]:.3g} at step {s[-1][0]}" for k, s in curves.items()]
    return render(name, title, draw, alt=f"{title} by step: {'; '.join(told)}.", caption=caption)


def _axes(figure: Figure, xlabel: str, ylabel: str | None) -> Axes:
    ax = figure.add_subplot()
    ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)
    if xlabel == "step":
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return ax


def _mark_chosen(ax: Axes, run: RunFolder) -> None:
    if run.chosen_step is not None:
        ax.axvline(run.chosen_step, color=GREEN, linestyle=":", label=f"chosen: step {run.chosen_step}")


def _scores(results: TaskResults) -> dict[str, Any]:
    return results.scores.get(results.split or "", {})


def _pairs(results: TaskResults) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of the valid answers."""
    if results.rows is None:
        return np.empty(0), np.empty(0)
    rows = results.rows[results.rows["valid"]]
    return rows["target"].to_numpy(float), rows["value"].to_numpy(float)


def _said(scores: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{n} {'undefined' if scores.get(n) is None else format(scores[n], '.4f')}" for n in names)
