"""Pictures of a training by step: loss, learning rate, validation, gradient norm, gate weights.

Every function returns None where there is nothing to show.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from trainer.results.printable import printable
from trainer.results.report.drawing import BLUE, GREEN, MUTED, ORANGE, RED, SERIES, Names, Picture, axes, render
from trainer.results.run_folder import RunFolder, Series

POINTS = 1200  # of a curve; a longer one is drawn as means over as many steps as needed
SMOOTHED = 60  # points from which on a curve is also drawn smoothed


def run_pictures(run: RunFolder) -> list[Picture]:
    """All pictures of a run's training."""
    return [p for p in (loss(run), learning_rate(run), validation(run), gradient_norm(run), gate_usage(run)) if p]


def loss(run: RunFolder) -> Picture | None:
    """The loss, smoothed where the curve is long; skipped steps and spikes are marked."""
    series = run.journal.get("train/loss")
    if not series:
        return None
    values = np.array([value for _, value in series])
    log = bool(values.min() > 0 and values.max() > 50 * values.min())
    skipped, spikes = marked(run, "train/skipped"), marked(run, "train/spike")

    def draw(figure: Figure, names: Names) -> None:
        ax = axes(figure, "step", "loss" + (" (log)" if log else ""))
        steps, losses = thin(series)
        smoothed = len(losses) > SMOOTHED
        marker = "." if len(losses) == 1 else ""
        ax.plot(steps, losses, color=BLUE, alpha=0.35 if smoothed else 1.0, label="loss", marker=marker)
        if smoothed:
            ax.plot(steps, pd.Series(losses).ewm(halflife=len(losses) / 60).mean(), color=BLUE, label="smoothed")
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss_at = dict(series)
        if spikes:
            known = [step for step in spikes if step in loss_at]
            ax.plot(known, [loss_at[step] for step in known], "^", color=ORANGE, label=f"spikes: {len(spikes)}")
        if skipped:
            bottom, label = ax.get_xaxis_transform(), f"skipped steps: {len(skipped)}"
            ax.plot(skipped, [0.02] * len(skipped), "x", color=RED, transform=bottom, label=label)
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
    metrics = {"fusion": "train/lr_fusion", "backbone": "train/lr_backbone"}
    curves = {label: run.journal[name] for label, name in metrics.items() if run.journal.get(name)}
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
    """The selecting metric of every task at every validation, the chosen checkpoint marked."""
    curves = {task: series for task, series in run.selected().items() if series}
    if not curves:
        return None
    labels = {task: f"{task} {run.tasks[task].select}" for task in curves}
    chosen = run.chosen_step

    def draw(figure: Figure, names: Names) -> None:
        ax = axes(figure, "step", "selecting metric")
        for (task, series), colour in zip(curves.items(), SERIES * len(curves), strict=False):
            ax.plot(*zip(*series, strict=True), color=colour, marker="o", markersize=3.5, label=printable(labels[task]))
            if chosen in dict(series):
                ax.plot([chosen], [dict(series)[chosen]], "*", color=colour, markersize=12)
        _mark_chosen(ax, run)
        ax.legend(loc="best")

    last = [f"{labels[task]} {series[-1][1]:.4f} at step {series[-1][0]}" for task, series in curves.items()]
    choice = "no checkpoint is chosen yet" if chosen is None else f"the checkpoint of step {chosen} is chosen"
    less = [task for task in curves if not run.tasks[task].greater_is_better]
    caption = ""
    if less:
        caption = "Less is better." if len(curves) == 1 else f"Less is better for {', '.join(less)}."
    alt = f"Selecting metric on the validation split by step: {'; '.join(last)}; {choice}."
    return render("validation", "Validation", draw, alt=alt, caption=caption)


def marked(run: RunFolder, name: str) -> list[int]:
    """The steps that the metric `name` marks: those at which it is not 0."""
    return [step for step, value in run.journal.get(name, []) if value]


def thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; of a long series means over so many neighbours that at most POINTS remain."""
    steps, values = (np.array(column, dtype=float) for column in zip(*series, strict=True))
    size = -(-len(steps) // POINTS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


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
        ax = axes(figure, "step", ylabel)
        for (label, series), colour in zip(curves.items(), SERIES * len(curves), strict=False):
            ax.plot(*thin(series), color=colour, label=printable(label), marker="." if len(series) == 1 else "")
        if level:
            ax.axhline(level[1], color=MUTED, linestyle="--", linewidth=1, label=level[0])
        ax.set_ylim(bottom=0)
        ax.legend(loc="best")

    ends = [f"{k} {s[0][1]:.3g} at step {s[0][0]}, {s[-1][1]:.3g} at step {s[-1][0]}" for k, s in curves.items()]
    return render(name, title, draw, alt=f"{title} by step: {'; '.join(ends)}.", caption=caption)


def _mark_chosen(ax: Axes, run: RunFolder) -> None:
    if run.chosen_step is not None:
        ax.axvline(run.chosen_step, color=GREEN, linestyle=":", label=f"chosen: step {run.chosen_step}")
