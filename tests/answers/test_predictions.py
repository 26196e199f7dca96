"""Predictions from scores, and strict parsing: against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.answers.predictions import parse_answer, parse_answers, predict
from trainer.answers.tree import AnswerError
from trainer.tasks import BUILT_IN, define_task


def exact_probabilities(row: list[float]) -> list[Fraction]:
    odds = [Fraction(math.exp(x - max(row))) for x in row]
    return [o / sum(odds) for o in odds]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_predictions_equal_exact_arithmetic(data):
    task = BUILT_IN[data.draw(st.sampled_from(["meld", "mosei", "simsv2"]))]
    count = len(task.answers())
    rows = data.draw(st.lists(st.lists(st.floats(-80, 0), min_size=count, max_size=count), min_size=1, max_size=3))
    got = predict(task, torch.tensor(rows, dtype=torch.float64))
    modes = predict(task, np.array(rows), mode="mode")
    assert got.valid_B.all()
    for b, row in enumerate(rows):
        p = exact_probabilities(row)
        best = row.index(max(row))
        np.testing.assert_allclose(got.probability_BC[b], [float(x) for x in p], rtol=1e-12)
        assert got.answers[b] == modes.answers[b] == task.answers()[best]
        if task.grid is None:
            assert got.value_B[b] == best
        else:
            numbers = [Fraction(v) for v in task.grid.values]
            expected = sum(x * v for x, v in zip(p, numbers, strict=True))
            assert got.value_B[b] == pytest.approx(float(expected), abs=1e-13)
            assert modes.value_B[b] == task.grid.values[best]


def test_ties_go_to_the_first_answer():
    meld, sims = BUILT_IN["meld"], BUILT_IN["simsv2"]
    assert predict(meld, torch.zeros(1, 7)).value_B.tolist() == [0.0]
    assert predict(meld, torch.tensor([[-3.0, -1, -2, -1, -1, -9, -9]])).answers == ["surprise"]
    assert predict(sims, torch.zeros(1, 21), mode="mode").value_B.tolist() == [-1.0]
    assert predict(sims, torch.zeros(1, 21)).value_B == pytest.approx(0.0, abs=1e-15)


def test_a_difference_that_the_softmax_cannot_hold_is_no_tie():
    scores = np.full((1, 7), -50.0)
    scores[0, :2] = -1e-3, np.nextafter(-1e-3, 0)
    got = predict(BUILT_IN["meld"], scores)
    assert got.probability_BC[0, 0] == got.probability_BC[0, 1]
    assert got.answers == ["surprise"]


def test_the_style_changes_the_answers_not_the_values():
    scores = torch.tensor([[-3.0, -1, -2, -5, -5, -9, -9]])
    words, indices = (predict(BUILT_IN["meld"], scores, style) for style in ("words", "indices"))
    assert (words.answers, indices.answers) == (["surprise"], ["1"])
    assert words.value_B.tolist() == indices.value_B.tolist() == [1.0]


def test_predictions_of_a_sample_do_not_depend_on_its_batch():
    scores = torch.randn(64, 61, generator=torch.Generator().manual_seed(0)) * 5
    whole = predict(BUILT_IN["mosei"], scores)
    for start, size in ((0, 1), (7, 3), (16, 48)):
        part = predict(BUILT_IN["mosei"], scores[start : start + size])
        assert (part.value_B == whole.value_B[start : start + size]).all()
        assert (part.probability_BC == whole.probability_BC[start : start + size]).all()


def test_scores_of_a_diverged_model_make_no_prediction():
    scores = torch.zeros(5, 7)
    scores[0, 3] = float("nan")
    scores[1, 3] = float("inf")
    scores[2] = -float("inf")
    scores[3, :6] = -float("inf")
    got = predict(BUILT_IN["meld"], scores)
    assert got.valid_B.tolist() == [False, False, False, True, True]
    assert got.answers[:4] == ["", "", "", "anger"]
    assert got.probability_BC[3].tolist() == [0.0] * 6 + [1.0]
    assert np.isnan(got.probability_BC[:3]).all()


def test_scores_come_in_any_precision_and_keep_no_graph():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    got = predict(BUILT_IN["meld"], scores)
    assert got.probability_BC.dtype == np.float64
    np.testing.assert_allclose(got.probability_BC, scores.detach().double().softmax(1).numpy(), rtol=1e-14)


def test_no_samples_are_no_predictions():
    got = predict(BUILT_IN["mosei"], torch.zeros(0, 61))
    assert len(got) == 0
    assert got.probability_BC.shape == (0, 61)


@pytest.mark.parametrize("shape", [(2, 6), (7,), (1, 2, 7)])
def test_scores_must_be_one_for_each_answer(shape):
    with pytest.raises(AnswerError, match=r"meld has 7 answers: their scores must be \[B, 7\]"):
        predict(BUILT_IN["meld"], torch.zeros(shape))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("style", ["words", "indices"])
def test_every_answer_parses_to_itself(name, style):
    task = BUILT_IN[name]
    expected = list(range(len(task.labels))) if task.grid is None else list(task.grid.values)
    texts = [f" {text}\n" for text in task.answer_texts(style, "en")]
    got = parse_answers(task, texts, style)
    assert got.value_B.tolist() == expected
    assert got.answers == texts
    assert got.valid_B.all()
    assert got.probability_BC is None


@pytest.mark.parametrize(
    ("name", "style", "text"),
    [
        ("meld", "words", text)
        for text in ["", " ", "Joy", "joy.", "joyful", "jo", "joy joy", "4", "neutral, joy", "<joy>", "高兴", "j oy"]
    ]
    + [("meld", "indices", text) for text in ["joy", "7", "-1", "4.0", "04", "+4", "４"]]
    + [
        ("mosei", "words", text)
        for text in [
            *("", "-0.0", "+1.0", "1", "1.", "1.00", ".5", "1.05", "3.1", "-3.1", "1,0", "1.0.", "nan", "inf", "1e0"),
            *("− 1.0", "−1.0", "１.０", "1.0 positive", "neutral", "- 1.0", "0", "-0"),
        ]
    ],
)
def test_anything_else_is_invalid_and_never_zero_or_a_label(name, style, text):
    assert parse_answer(BUILT_IN[name], text, style) is None
    got = parse_answers(BUILT_IN[name], [text], style)
    assert np.isnan(got.value_B).all()
    assert got.answers == [text]


@settings(max_examples=60, deadline=None)
@given(st.integers(-30, 29), st.integers(1, 30), st.sampled_from([1, 2, 5]))
def test_grids_of_own_tasks_parse_exactly_their_numbers(low, steps, step):
    grid = {"low": low / 10, "high": (low + steps * step) / 10, "step": step / 10}
    task = define_task({"name": "own", "kind": "regression", "grid": grid})
    inside = set(range(low, low + steps * step + 1, step))
    for tenth in range(low - 3, low + steps * step + 4):
        text = f"{'-' if tenth < 0 else ''}{abs(tenth) // 10}.{abs(tenth) % 10}"
        value = parse_answer(task, text)
        assert value == (tenth / 10 if tenth in inside else None)
        assert parse_answer(task, text + "0") is None
