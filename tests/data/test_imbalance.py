"""Weights and draws by class, against counting and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from tests.toy import prepare_toy
from trainer.config import load_config
from trainer.data.dataset import open_dataset
from trainer.data.imbalance import answer_indices, class_weights, draw_probabilities, training_sampler
from trainer.data.sampling import GlobalBatchSampler
from trainer.tasks import get_task

SIZES = np.array([470, 120, 0, 30, 1])
class_N = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))


def test_inverse_weights_are_those_of_scikit_learn() -> None:
    there = np.flatnonzero(SIZES)
    expected = compute_class_weight("balanced", classes=there, y=class_N)
    got = class_weights(class_N, len(SIZES), "inverse", 0.0)
    np.testing.assert_allclose(got[there], expected, rtol=1e-6)
    assert got[2] == 0
    assert got.dtype == np.float32


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_effective_weights_by_hand(beta: float) -> None:
    got = class_weights(class_N, len(SIZES), "effective", beta)
    effective = [sum(beta**k for k in range(n)) for n in SIZES if n]  # 1 + beta + beta^2 + ..., n terms
    np.testing.assert_allclose(got[SIZES > 0] / got[0], np.array(effective[0]) / effective, rtol=1e-5)
    assert got[class_N].mean() == pytest.approx(1.0)


@pytest.mark.parametrize(("how", "power"), [("balanced", 0.0), ("sqrt", 0.5)])
def test_draws_follow_the_classes(how: str, power: float) -> None:
    there = SIZES > 0
    expected = SIZES[there] ** power / (SIZES[there] ** power).sum()
    probability_N = draw_probabilities(class_N, how)  # type: ignore[arg-type]
    np.testing.assert_allclose([probability_N[class_N == c].sum() for c in np.flatnonzero(there)], expected)
    lengths = {"meld": np.random.default_rng(1).integers(1, 90, len(class_N))}
    order, again = (
        GlobalBatchSampler(lengths, global_batch=16, seed=3, draws={"meld": probability_N}) for _ in range(2)
    )
    steps = 40 * order.steps_per_epoch
    drawn = [order.step(s) for s in range(steps)]
    assert drawn[::-1] == [again.step(s) for s in reversed(range(steps))]  # of seed and epoch alone
    assert drawn[0].indices != drawn[order.steps_per_epoch].indices
    seen = class_N[[i for batch in drawn for i in batch.indices]]
    assert len(seen) == 40 * len(class_N)
    np.testing.assert_allclose([(seen == c).mean() for c in np.flatnonzero(there)], expected, atol=0.015)


def test_the_runs_order(tmp_path: Path) -> None:
    prepare_toy("simsv2", tmp_path)
    view = open_dataset(tmp_path / "simsv2")["train"]
    tiny = Path(__file__).parents[2] / "configs" / "tiny.yaml"

    def order(*overrides: str) -> GlobalBatchSampler:
        return training_sampler(
            load_config(tiny, ["task=simsv2", "train.global_batch=48", *overrides]), {"simsv2": view}
        )

    plain = GlobalBatchSampler({"simsv2": view.lengths()}, global_batch=48, seed=0)
    natural = order()
    assert [natural.step(s) for s in range(5)] == [plain.step(s) for s in range(5)]
    held_N = answer_indices(get_task("simsv2"), view.targets())
    assert held_N.max() > 2
    balanced = order("data.sampling=balanced")
    drawn = [i for s in range(400) for i in balanced.step(s).indices]
    counts = np.bincount(held_N[drawn])
    assert counts[counts > 0].std() / counts[counts > 0].mean() < 0.1
