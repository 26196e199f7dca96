"""Metrics against references written apart from them: scalar Python, published-style float32 arrays, scikit-learn reports."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report

from trainer.answers.metrics import MetricError, calibration_error, compute, reliability
from trainer.answers.predictions import predict
from trainer.tasks import BUILT_IN, define_task

MELD, MOSEI, SIMS = BUILT_IN["meld"], BUILT_IN["mosei"], BUILT_IN["simsv2"]
f32 = np.float32
NAN = math.nan

# ---- the reference: one sample at a time, no numpy but for the rounding of numbers to float32


def ref_weighted_f1(truth: list, guess: list) -> float | None:
    """Σ over true classes of their share times 2 tp / (true + predicted)."""
    true, output = Counter(truth), Counter(guess)
    hits = Counter(t for t, g in zip(truth, guess, strict=True) if t == g)
    return sum(n / len(truth) * 2 * hits[c] / (n + output[c]) for c, n in true.items()) if truth else None


def ref_accuracy(truth: list, guess: list) -> float | None:
    return sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth) if truth else None


def ref_corr(x: list[float], y: list[float]) -> float | None:
    if len({f32(v) for v in x}) < 2 or len({f32(v) for v in y}) < 2:
        return None
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    sxy = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return sxy / math.sqrt(math.fsum((a - mx) ** 2 for a in x) * math.fsum((b - my) ** 2 for b in y))


def ref_rest(truth: list[float], guess: list[float | None], bound: float) -> dict[str, float | None]:
    pairs = [(t, g) for t, g in zip(truth, guess, strict=True) if g is not None]
    pairs = [tuple(min(max(v, -bound), bound) for v in pair) for pair in pairs]
    t, g = [a for a, _ in pairs], [b for _, b in pairs]
    mean = math.fsum(t) / len(t) if t else 0.0
    spread = math.fsum((a - mean) ** 2 for a in t)
    r2 = None if len({f32(a) for a in t}) < 2 else 1 - math.fsum((a - b) ** 2 for a, b in pairs) / spread
    return {
        "mae": math.fsum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else None,
        "corr": ref_corr(t, g),
        "r2": r2,
    }


def apply(rule, values: list[float | None]) -> list:
    return ["invalid" if v is None else rule(f32(v)) for v in values]


def ref_mosei(truth: list[float], guess: list[float | None]) -> dict[str, float | None]:
    def to_class(limit: int):
        return lambda v: round(min(max(float(v), -limit), limit))  # Python rounds half to even

    has0 = apply(lambda v: v >= f32(0), truth), apply(lambda v: v >= f32(0), guess)
    kept = [(t, g) for t, g in zip(truth, guess, strict=True) if f32(t) != 0]
    non0 = apply(lambda v: v > f32(0), [t for t, _ in kept]), apply(lambda v: v > f32(0), [g for _, g in kept])
    rest = ref_rest(truth, guess, math.inf)
    return {
        "has0_acc": ref_accuracy(*has0),
        "has0_f1": ref_weighted_f1(*has0),
        "non0_acc": ref_accuracy(*non0),
        "non0_f1": ref_weighted_f1(*non0),
        "acc7": ref_accuracy(apply(to_class(3), truth), apply(to_class(3), guess)),
        "acc5": ref_accuracy(apply(to_class(2), truth), apply(to_class(2), guess)),
        "mae": rest["mae"],
        "corr": rest["corr"],
    }


def ref_sims(truth: list[float], guess: list[float | None]) -> dict[str, float | None]:
    def to_class(*cuts: float):
        return lambda v: sum(v > f32(cut) for cut in cuts)  # right-closed: a cut belongs to the class below it

    two = apply(to_class(0), truth), apply(to_class(0), guess)
    weak = [i for i, t in enumerate(truth) if f32(-0.4) <= f32(t) <= f32(0.4)]
    three, five = to_class(-0.1, 0.1), to_class(-0.7, -0.1, 0.1, 0.7)
    rest = ref_rest(truth, guess, 1.0)
    return {
        "acc2": ref_accuracy(*two),
        "acc3": ref_accuracy(apply(three, truth), apply(three, guess)),
        "acc5": ref_accuracy(apply(five, truth), apply(five, guess)),
        "f1": ref_weighted_f1(*two),
        "weak_acc2": ref_accuracy([two[0][i] for i in weak], [two[1][i] for i in weak]),
        **rest,
    }


def same(got: dict, want: dict) -> None:
    for key, value in want.items():
        if value is None:
            assert got[key] is None, key
        else:
            tolerance = 1e-6 if key in ("corr", "r2") else 1e-12  # values one float32 step apart amplify rounding
            assert got[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


def special(bound: float, thirds: bool):
    """Numbers where rules bite: grids, halves, thirds, cuts, as float64, as upcast float32, and one step beside."""
    steps = [i / 10 for i in range(-int(bound * 10), int(bound * 10) + 1)]
    steps += [i / 3 for i in range(-9, 10)] if thirds else []
    steps += [-0.4, 0.4, -0.7, 0.7, -0.1, 0.1, 0.0, -0.0]
    values = {*steps, *(float(f32(v)) for v in steps)}
    values |= {float(np.nextafter(v, f32(s * 9))) for v in map(f32, steps) for s in (-1, 1)}
    return st.sampled_from(sorted(v for v in values if abs(v) <= bound))


def pairs(bound: float, thirds: bool):
    truth = st.one_of(special(bound, thirds), st.floats(-bound, bound))
    guess = st.one_of(special(bound, thirds), st.floats(-4, 4), st.none())
    return st.lists(st.tuples(truth, guess), min_size=1, max_size=25)


@settings(max_examples=80, deadline=None)
@given(pairs(3.0, True))
@example([(0.0, 0.0), (0.0, -0.0), (0.0, -1e-50), (1 / 3, 1e-50)])
def test_mosei_equals_the_reference(samples):
    truth, guess = map(list, zip(*samples, strict=True))
    same(compute(MOSEI, truth, guess), ref_mosei(truth, guess))


@settings(max_examples=80, deadline=None)
@given(pairs(1.0, False))
@example([(float(f32(0.1)), 0.1), (-0.1, float(f32(-0.1))), (0.4, 1.0), (float(f32(0.4)), -1.0)])
def test_sims_equals_the_reference(samples):
    truth, guess = map(list, zip(*samples, strict=True))
    same(compute(SIMS, truth, guess), ref_sims(truth, guess))
    same(compute(BUILT_IN["diagnostic-regression"], truth, guess), ref_sims(truth, guess))


# ---- published style: whole float32 arrays


def published_bins(values: np.ndarray, edges: list[float]) -> np.ndarray:
    out = np.full(len(values), -1)
    for i, (low, high) in enumerate(pairwise(edges)):
        out[(values > low) & (values <= high)] = i
    return out


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_bit_exact_and_sums_close_to_published_float32(seed):
    rng = np.random.default_rng(seed)
    truth = (rng.integers(-9, 10, 700) / 3).astype(f32)
    guess = np.where(rng.random(700) < 0.5, rng.integers(-35, 36, 700) / 10, rng.normal(0, 1.5, 700)).astype(f32)
    got = compute(MOSEI, truth, guess)
    assert got["acc7"] == np.mean(np.round(np.clip(guess, -3.0, 3.0)) == np.round(np.clip(truth, -3.0, 3.0)))
    assert got["acc5"] == np.mean(np.round(np.clip(guess, -2.0, 2.0)) == np.round(np.clip(truth, -2.0, 2.0)))
    assert got["has0_acc"] == np.mean((guess >= 0) == (truth >= 0))
    kept = truth != 0
    assert got["non0_acc"] == np.mean((guess[kept] > 0) == (truth[kept] > 0))
    assert got["mae"] == pytest.approx(np.mean(np.abs(guess - truth)), abs=1e-6)
    assert got["corr"] == pytest.approx(np.corrcoef(guess, truth)[0, 1], abs=1e-12)
    for key, x, y in (("has0_f1", truth >= 0, guess >= 0), ("non0_f1", truth[kept] > 0, guess[kept] > 0)):
        report = classification_report(x, y, output_dict=True, zero_division=0)
        assert got[key] == pytest.approx(report["weighted avg"]["f1-score"], abs=1e-15)

    truth, guess = np.round(truth / 3, 1).astype(f32), np.round(guess / 2.5, 1).astype(f32)
    got = compute(SIMS, truth, guess)
    truth, guess = np.clip(truth, -1.0, 1.0), np.clip(guess, -1.0, 1.0)
    edges = {"acc2": [-1.01, 0.0, 1.01], "acc3": [-1.01, -0.1, 0.1, 1.01], "acc5": [-1.01, -0.7, -0.1, 0.1, 0.7, 1.01]}
    for key, cuts in edges.items():
        assert got[key] == np.mean(published_bins(guess, cuts) == published_bins(truth, cuts))
    weak = (truth >= -0.4) & (truth <= 0.4)
    assert got["weak_acc2"] == np.mean((guess > 0)[weak] == (truth > 0)[weak])
    assert got["mae"] == pytest.approx(np.mean(np.abs(guess - truth)), abs=1e-6)
    residual = np.sum((truth - guess).astype(float) ** 2) / np.sum((truth.astype(float) - truth.mean(dtype=float)) ** 2)
    assert got["r2"] == pytest.approx(1 - residual, abs=1e-6)


# ---- single rules, by hand


@pytest.mark.parametrize(
    ("truth", "guess", "acc7", "acc5"),
    [
        (0.0, 0.5, 1, 1),  # half to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2
        (1.0, 0.5, 0, 0),
        (2.0, 1.5, 1, 1),
        (2.0, 2.5, 1, 1),
        (3.0, 2.5, 0, 1),  # five classes know no 3
        (0.0, -0.5, 1, 1),
        (-2.0, -1.5, 1, 1),
        (-2.0, -2.5, 1, 1),
        (3.0, 3.5, 1, 1),  # 3.5 would round to 4: clipped first
        (3.0, 99.0, 1, 1),
        (-3.0, -3.5, 1, 1),
        (2.0, 3.0, 0, 1),
        (1.0, float(f32(1.4999999)), 1, 1),
        (2.0, 1.4999999999, 1, 1),  # 1.5 in float32
        (1 / 3, 0.4, 1, 1),
        (2 / 3, 0.4, 0, 0),
    ],
)
def test_seven_and_five_classes(truth, guess, acc7, acc5):
    got = compute(MOSEI, [truth], [guess])
    assert (got["acc7"], got["acc5"]) == (acc7, acc5)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize(
    ("value", "two", "three", "five"),
    [
        *((-1.7, 0, 0, 0), (-1.0, 0, 0, 0), (-0.8, 0, 0, 0), (-0.7, 0, 0, 0), (-0.6, 0, 0, 1), (-0.1, 0, 0, 1)),
        *((-0.09, 0, 1, 2), (0.0, 0, 1, 2), (-0.0, 0, 1, 2), (0.05, 1, 1, 2), (0.1, 1, 1, 2), (0.2, 1, 2, 3)),
        *((0.7, 1, 2, 3), (0.8, 1, 2, 4), (1.0, 1, 2, 4), (1.7, 1, 2, 4)),
    ],
)
def test_classes_of_sims_are_right_closed_in_float32(value, two, three, five, upcast):
    """The 0.1 of a float32 label is 0.10000000149 in float64, yet stays in the class that ends with 0.1."""
    value = float(f32(value)) if upcast else value
    middles = {"acc2": (-0.5, 0.5), "acc3": (-0.5, 0.0, 0.5), "acc5": (-0.9, -0.4, 0.0, 0.4, 0.9)}
    for key, want in (("acc2", two), ("acc3", three), ("acc5", five)):
        hits = [compute(SIMS, [middle], [value])[key] for middle in middles[key]]
        assert hits.index(1.0) == want
        assert sum(hits) == 1
        assert [compute(SIMS, [value], [middle])[key] for middle in middles[key]] == hits


def test_sims_clips_everything_to_one():
    got = compute(SIMS, [1.0, -1.0, 0.5], [3.0, -2.0, 0.25])
    assert got["mae"] == pytest.approx(0.25 / 3)
    assert got["r2"] == pytest.approx(1 - 0.0625 / np.sum((np.array([1, -1, 0.5]) - 1 / 6) ** 2))
    assert got["corr"] == pytest.approx(np.corrcoef([1, -1, 0.5], [1, -1, 0.25])[0, 1])


def test_mosei_clips_neither_mae_nor_corr():
    got = compute(MOSEI, [3.0, -3.0, 0.0], [5.0, -3.0, 0.0])
    assert got["mae"] == pytest.approx(2 / 3)
    assert got["corr"] == pytest.approx(np.corrcoef([3, -3, 0], [5, -3, 0])[0, 1])


@pytest.mark.parametrize(("value", "inside"), [(0.4, True), (0.41, False), (-0.4, True), (0.0, True), (-0.5, False)])
@pytest.mark.parametrize("upcast", [False, True])
def test_the_weak_subset_is_up_to_point_four(value, inside, upcast):
    value = float(f32(value)) if upcast else value
    got = compute(SIMS, [value], [value])
    assert got["weak_acc2"] == (1.0 if inside else None)


def test_zero_in_both_ways_of_two_classes():
    got = compute(MOSEI, [0.0, 0.0, 1.0, -1.0], [0.0, -0.1, 0.0, 0.0])
    assert got["has0_acc"] == 0.5  # 0 is positive here: hit, miss, hit, miss
    assert got["non0_acc"] == 0.5  # the last two; a zero prediction is negative here
    assert compute(SIMS, [0.0, 0.1], [0.0, 0.0])["acc2"] == 0.5


def test_f1_weighs_by_the_truth_not_by_the_prediction():
    """Truth + + + -, prediction + - - -: F1 of + is 1/2, of - is 1/2; unequal with one more miss."""
    got = compute(MOSEI, [1.0, 1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, -1.0, -1.0])
    plus, minus = 2 * 1 / (3 + 1), 2 * 2 / (2 + 4)
    assert got["non0_f1"] == pytest.approx(0.6 * plus + 0.4 * minus)
    assert got["non0_f1"] != pytest.approx(0.2 * plus + 0.8 * minus)


# ---- invalid and undefined


@pytest.mark.parametrize("nothing", [None, NAN, math.inf, -math.inf, 1e39])
def test_an_invalid_prediction_is_wrong_and_left_out(nothing):
    got = compute(MOSEI, [1.0, -1.0, 0.0, 2.0], [1.0, -1.0, nothing, nothing])
    assert got["invalid_rate"] == 0.5
    assert got["has0_acc"] == 0.5
    assert got["non0_acc"] == pytest.approx(2 / 3)
    assert got["acc7"] == got["acc5"] == 0.5
    assert got["mae"] == 0.0
    assert got["corr"] == pytest.approx(1.0)
    # + : 1 hit of 3 true, 1 predicted; - : 1 of 1, 1 predicted
    assert got["has0_f1"] == pytest.approx(3 / 4 * (2 / 4) + 1 / 4 * 1)
    sims = compute(SIMS, [0.5, -0.5, 0.0, 0.2], [0.5, -0.5, nothing, nothing])
    assert (sims["acc2"], sims["acc3"], sims["acc5"], sims["weak_acc2"]) == (0.5, 0.5, 0.5, 0.0)
    assert (sims["mae"], sims["r2"]) == (0.0, 1.0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_invalid_scores_zero_and_errors_are_undefined(name):
    task = BUILT_IN[name]
    truth = [0.0, 1.0, 1.0] if task.grid is None else [0.0, 0.3, -1.0]
    got = compute(task, truth, [None] * 3, np.full((3, len(task.answers())), NAN))
    assert (got["n"], got["invalid_rate"]) == (3, 1.0)
    for key in task.metrics:
        assert got[key] == (None if key in ("mae", "corr", "r2") else 0.0)
    assert got["nll"] is None
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_samples_define_nothing(name):
    task = BUILT_IN[name]
    got = compute(task, [], [])
    assert got["n"] == 0
    assert all(got[key] is None for key in ("invalid_rate", *task.metrics))


def test_constant_predictions_have_no_correlation():
    truth = [1.0, -1.0, 2.0, 0.1]
    for guess in ([0.3] * 4, [0.3, 0.3 + 1e-12, 0.3, 0.3 - 1e-12]):  # as constant in float32
        got = compute(MOSEI, truth, guess)
        assert got["corr"] is None
        assert got["mae"] == pytest.approx(0.975)
    got = compute(SIMS, [0.1] * 3, [0.1, 0.2, 0.3])
    assert (got["corr"], got["r2"]) == (None, None)
    assert compute(SIMS, [0.1, 0.3, 0.5], [0.2] * 3)["r2"] == pytest.approx(-0.375)
    assert compute(SIMS, [2.0, 3.0], [0.1, 0.2])["corr"] is None  # constant once clipped
    assert compute(MOSEI, [1.0], [2.0])["corr"] is None
    assert compute(MOSEI, [1.0, 2.0], [2.0, None])["corr"] is None


def test_a_subset_without_samples_is_undefined():
    got = compute(MOSEI, [0.0, -0.0], [1.0, None])
    assert (got["non0_acc"], got["non0_f1"], got["has0_acc"]) == (None, None, 0.5)
    assert compute(SIMS, [0.9, -0.9], [0.9, -0.9])["weak_acc2"] is None


# ---- classification


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.none() | st.integers(0, 6)), min_size=1, max_size=40))
def test_emotion_equals_a_report_over_words(samples):
    truth, guess = map(list, zip(*samples, strict=True))
    got = compute(MELD, truth, guess)
    words = [MELD.labels[t] for t in truth]
    output = ["no answer" if g is None else MELD.labels[g] for g in guess]
    report = classification_report(words, output, output_dict=True, zero_division=0)
    present = sorted(({*words, *output}) - {"no answer"})
    assert got["acc"] == pytest.approx(np.mean(np.array(words) == np.array(output)))
    assert got["wf1"] == pytest.approx(report["weighted avg"]["f1-score"])
    assert got["wf1"] == pytest.approx(ref_weighted_f1(words, output))
    assert got["macro_f1"] == pytest.approx(np.mean([report[label]["f1-score"] for label in present]))
    assert got["invalid_rate"] == output.count("no answer") / len(output)
    for label in MELD.labels:
        row = got["per_class"][label]
        true, predicted = words.count(label), output.count(label)
        hits = sum(w == s == label for w, s in zip(words, output, strict=True))
        assert row["support"] == true
        assert row["recall"] == (pytest.approx(hits / true) if true else None)
        assert row["precision"] == (pytest.approx(hits / predicted) if predicted else None)
        assert row["f1"] == (pytest.approx(2 * hits / (true + predicted)) if true + predicted else None)
    confusion = got["confusion"]
    assert confusion["labels"] == list(MELD.labels)
    for i, a in enumerate(MELD.labels):
        for j, b in enumerate(MELD.labels):
            assert confusion["matrix"][i][j] == sum((w, s) == (a, b) for w, s in zip(words, output, strict=True))
        assert confusion["invalid"][i] == sum((w, s) == (a, "no answer") for w, s in zip(words, output, strict=True))
    json.dumps(got, allow_nan=False)


def test_a_failed_run_does_not_score_as_neutral():
    truth = [0] * 48 + [4] * 52
    assert compute(MELD, truth, [None] * 100)["acc"] == 0.0
    assert compute(MELD, truth, [0] * 100)["acc"] == 0.48


def test_the_majority_class_of_meld():
    """The published counts of the test split; weighted F1 of one class with share s and F1 2s / (1 + s) is s times it."""
    truth = np.repeat(range(7), [1256, 281, 50, 208, 402, 68, 345])
    got, share = compute(MELD, truth, np.zeros(2610)), 1256 / 2610
    assert got["acc"] == pytest.approx(share)
    assert got["wf1"] == pytest.approx(2 * share**2 / (1 + share))
    assert got["macro_f1"] == pytest.approx(2 * share / (1 + share) / 7)


# ---- calibration


def ref_ece(truth: list[int], p: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for i in range(bins):
        rows = [(max(row), row.argmax() == t) for t, row in zip(truth, p, strict=True)]
        rows = [(c, hit) for c, hit in rows if i / bins < c <= (i + 1) / bins]
        if rows:
            total += len(rows) / len(truth) * abs(np.mean([h for _, h in rows]) - np.mean([c for c, _ in rows]))
    return float(total)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_equals_the_reference(seed):
    rng = np.random.default_rng(seed)
    output = predict(MELD, rng.normal(0, 3, (300, 7)))
    p, truth = output.probability_BC, rng.integers(0, 7, 300)
    got = compute(MELD, truth, output.value_B, p)
    assert got["ece"] == pytest.approx(ref_ece(list(truth), p), abs=1e-12)
    assert got["nll"] == pytest.approx(-np.mean([math.log(row[t]) for t, row in zip(truth, p, strict=True)]), rel=1e-9)
    brier = [sum((row[c] - (c == t)) ** 2 for c in range(7)) for t, row in zip(truth, p, strict=True)]
    assert got["brier"] == pytest.approx(np.mean(brier))
    shuffled = rng.permutation(300)
    again = compute(MELD, truth[shuffled], output.value_B[shuffled], p[shuffled])
    assert all(again[key] == pytest.approx(got[key]) for key in ("ece", "ece_adaptive", "nll", "brier"))


def test_calibration_by_hand():
    two = define_task({"name": "two", "kind": "classification", "labels": ["a", "b"]})
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    got = compute(two, [0, 1, 1, 0], [0, 0, 1, 1], p)
    # bins of a fifteenth: 0.6 ends the ninth, 0.8 the twelfth, 0.9 lies in the fourteenth
    assert got["ece"] == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.8) + abs(0 - 0.6)) / 4)
    assert got["brier"] == pytest.approx((2 * 0.01 + 2 * 0.81 + 2 * 0.04 + 2 * 0.36) / 4)
    rows = reliability([0, 1, 1, 0], [0, 0, 1, 1], p)
    assert [(i, row["n"]) for i, row in enumerate(rows) if row["n"]] == [(8, 1), (11, 1), (13, 2)]
    assert rows[0] == {"low": 0.0, "high": 1 / 15, "n": 0, "confidence": None, "accuracy": None}
    quarters = reliability([0, 1, 1, 0], [0, 0, 1, 1], p, bins=2, adaptive=True)
    assert [row["n"] for row in quarters] == [2, 2]
    assert calibration_error(quarters) == pytest.approx((2 * abs(0.5 - 0.7) + 2 * abs(0.5 - 0.9)) / 4)
    assert calibration_error([]) is None


def test_equal_confidences_share_one_adaptive_bin():
    p = np.full((30, 7), 0.05)
    p[:, 2] = 0.7
    truth = [2] * 21 + [3] * 9
    got = compute(MELD, truth, [2] * 30, p)
    assert got["ece_adaptive"] == pytest.approx(0.0, abs=1e-12)
    assert got["ece"] == pytest.approx(0.0, abs=1e-12)


def test_certainty_stays_finite_and_invalid_rows_are_left_out():
    p = np.eye(7)[[0, 1, 1]]
    got = compute(MELD, [0, 0, 0], [0, 1, None], np.where(np.arange(3)[:, None] == 2, NAN, p))
    assert got["ece"] == 0.5
    assert got["brier"] == 1.0
    assert 10 < got["nll"] < 100
    json.dumps(got, allow_nan=False)


def test_the_grid_of_a_regression_has_a_likelihood():
    p = np.full((2, 61), 0.4 / 60)
    p[0, 30] = p[1, 60] = 0.6
    got = compute(MOSEI, [0.04, 3.0], [0.0, 2.0], p)
    assert got["nll"] == pytest.approx(-math.log(0.6))
    assert "ece" not in got


# ---- faults, keys

EMOTION_KEYS = ["acc", "wf1", "macro_f1", "uar"]
MOSEI_KEYS = ["has0_acc", "has0_f1", "non0_acc", "non0_f1", "acc7", "acc5", "mae", "corr"]
SIMS_KEYS = ["acc2", "acc3", "acc5", "f1", "weak_acc2", "mae", "corr", "r2"]
KEYS = {
    "meld": EMOTION_KEYS,
    "cherma": EMOTION_KEYS,
    "diagnostic": EMOTION_KEYS,
    "spoken": EMOTION_KEYS,
    "mosei": MOSEI_KEYS,
    "mosi": MOSEI_KEYS,
}
KEYS |= {"simsv2": SIMS_KEYS, "diagnostic-regression": SIMS_KEYS}


@pytest.mark.parametrize("name", BUILT_IN)
def test_keys_stand_in_their_order(name):
    task = BUILT_IN[name]
    got = compute(task, [0.0, 1.0], [1.0, 0.0])
    assert list(got)[: 2 + len(task.metrics)] == ["n", "invalid_rate", *KEYS[name]]
    assert task.select in got


def test_faults_come_together():
    p = np.full((4, 7), 1 / 7)
    p[1, 0] = 0.9
    with pytest.raises(MetricError) as error:
        compute(MELD, [0, 7, NAN, 1], [0, 1, 2, 1.5], p)
    text = str(error.value)
    assert "4 fault(s)" in text
    assert "truth that is not finite: nan at 2" in text
    assert "truth that is not a label index 0 … 6: 7.0 at 1" in text
    assert "prediction that is not a label index 0 … 6: 1.5 at 3" in text
    assert "do not sum to 1" in text
    with pytest.raises(MetricError, match=r"shape \(2,\) against predictions of \(1,\)"):
        compute(MELD, [0, 1], [0])
    with pytest.raises(MetricError, match=r"probabilities of shape \(1, 6\), not \(1, 7\)"):
        compute(MELD, [0], [0], p[:1, :6])
