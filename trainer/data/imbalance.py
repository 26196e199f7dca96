"""Classes of unequal size: weights of samples in the loss, and how often samples are drawn.

The classes of a regression task are the numbers of its grid. Shapes: N training samples, C answers of the task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from trainer.config import RunConfig
from trainer.data.dataset import SplitView
from trainer.data.sampling import GlobalBatchSampler
from trainer.tasks import Task


def answer_indices(task: Task, target_N: np.ndarray) -> np.ndarray:
    """`[N]`: the class of every sample, an index into the task's answers."""
    return np.array([task.answer_index(target) for target in target_N], dtype=np.int64)


def class_weights(class_N: np.ndarray, answers: int, how: Literal["inverse", "effective"], beta: float) -> np.ndarray:
    """`[C]`, float32: what a sample of each class weighs, with mean 1 over the samples; 0 where a class has none.

    With n_c samples of class c, the weights are proportional to ``1 / n_c`` (inverse), or to ``(1 - beta) / (1 - beta^n_c)``
    (effective: Cui et al. 2019, "Class-balanced loss based on effective number of samples").
    """
    count_C = np.bincount(class_N, minlength=answers)
    there = count_C > 0
    weight_C = np.zeros(answers)
    n_c = count_C[there].astype(np.float64)
    weight_C[there] = 1 / n_c if how == "inverse" else (1 - beta) / (1 - beta**n_c)
    return np.asarray(weight_C * (len(class_N) / max(float(count_C @ weight_C), 1e-300)), dtype=np.float32)


def draw_probabilities(class_N: np.ndarray, how: Literal["balanced", "sqrt"]) -> np.ndarray:
    """`[N]`: the probability of drawing each sample. Classes share the draws equally (balanced), or in proportion to the
    square roots of their sizes (sqrt); the samples of a class share its part equally."""
    count_C = np.bincount(class_N)
    share_C = np.where(count_C > 0, 1.0 if how == "balanced" else np.sqrt(count_C), 0.0)
    probability_N = (share_C / np.maximum(count_C, 1))[class_N]
    return np.asarray(probability_N / probability_N.sum())


def training_sampler(config: RunConfig, views: Mapping[str, SplitView]) -> GlobalBatchSampler:
    """The run's order of training samples. `views`: task -> its training split."""
    how = config.data.sampling
    draws = {}
    if how != "natural":
        draws = {
            name: draw_probabilities(answer_indices(view.task, view.targets()), how)
            for name, view in views.items()
            if len(view)
        }
    return GlobalBatchSampler.of_training(config, {name: view.lengths() for name, view in views.items()}, draws)
