"""Pictures of a task's gate weights: by expert, by modality inside each expert, by class and kind of sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from trainer.results.report.drawing import INK, SERIES, SIZE, Names, Picture, axes, heat_map, render
from trainer.results.task_results import GateGroup, Gates, TaskResults


def gate_pictures(results: TaskResults, end: str) -> list[Picture]:
    """All pictures of the gate, none where the model has no gate; `end` ends their names."""
    if results.gates is None:
        return []
    made = [gate_experts(results.gates, end), gate_modalities(results.gates, end)]
    for by in ("class", "kind"):
        if groups := results.gates.groups.get(by):
            word = "sign of the truth" if by == "class" and results.task.kind == "regression" else by
            made.append(gate_groups(groups, f"gate-{by}{end}", word))
    return made


def gate_experts(gates: Gates, end: str) -> Picture:
    """The experts' mean weights, with the range over samples."""
    weights, means = gates.expert_NE, gates.all.expert

    def draw(figure: Figure, names: Names) -> None:
        ax = axes(figure, "mean weight", None)
        low, high = np.percentile(weights, [5, 95], axis=0)
        center = np.array(list(means.values()))
        places = range(len(means))
        spread = np.clip([center - low, high - center], 0, None)
        ax.barh(places, center, 0.6, color=SERIES[: len(means)], alpha=0.5, xerr=spread, ecolor=INK, capsize=4)
        ax.set_yticks(places, [f"{name}\n{w:.3f}" for name, w in means.items()])
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.grid(False, axis="y")

    return render(
        f"gate-experts{end}", "Gate weights of the experts", draw, alt=f"Mean gate weights of the experts: {_listed(means, 3)}.",
        caption="The lines reach from the 5th to the 95th percentile of the samples.",
    )  # fmt: skip


def gate_modalities(gates: Gates, end: str) -> Picture:
    """The modalities' mean weights inside each expert."""
    modalities = list(gates.all.modality)
    weights = np.array([[inside[m] for m in modalities] for inside in gates.inside.values()])

    def draw(figure: Figure, names: Names) -> None:
        ax = figure.add_subplot()
        heat_map(ax, weights, [[f"{v:.3f}" for v in row] for row in weights], modalities, list(gates.inside))
        ax.set_ylabel("expert")

    listed = "; ".join(f"{expert}: {_listed(inside, 3)}" for expert, inside in gates.inside.items())
    return render(
        f"gate-modalities{end}", "Gate weights of the modalities inside each expert", draw,
        alt=f"Mean weights of the modalities inside each expert: {listed}.",
        caption="Rows sum to 1, less the share of samples for which an expert had no valid modality.",
    )  # fmt: skip


def gate_groups(groups: Sequence[GateGroup], name: str, by: str) -> Picture:
    """Mean weights of experts and modalities in each group of samples; `by` says what the groups are."""
    columns = [*groups[0].expert, *groups[0].modality]
    weights = np.array([[*group.expert.values(), *group.modality.values()] for group in groups])
    labels = [group.name for group in groups]

    def draw(figure: Figure, names: Names) -> None:
        ax = figure.add_subplot()
        rows = [f"{names(group.name)} ({group.n})" for group in groups]
        heat_map(ax, weights, [[f"{v:.2f}" for v in row] for row in weights], columns, rows)
        ax.axvline(len(groups[0].expert), color=INK, linewidth=1.5)
        ax.set_ylabel(by)

    listed = "; ".join(f"{group.name}: {_listed({**group.expert, **group.modality}, 2)}" for group in groups)
    return render(
        name, f"Gate weights by {by}", draw, alt=f"Mean gate weights by {by}: {listed}.", labels=labels,
        caption="Left of the line the experts, right of it the modalities over all experts; samples in brackets.",
        size=(SIZE[0], max(SIZE[1], 0.33 * len(groups) + 1.1)),
    )  # fmt: skip


def _listed(weights: dict[str, float], digits: int) -> str:
    return ", ".join(f"{name} {weight:.{digits}f}" for name, weight in weights.items())
