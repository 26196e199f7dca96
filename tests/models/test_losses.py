"""Smoothed and regression-aware losses against plain passes in float64 sums: every answer of every sample a row of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_egmf_packed import WIDTHS, Logits, Waits, magnitudes, make, samples
from tests.models.tiny_models import save_family
from trainer.answer_tree import Score
from trainer.answers.tree import task_tree
from trainer.config import DataConfig
from trainer.data.collate import Collator
from trainer.data.objective import Objective
from trainer.models.egmf import EGMF
from trainer.models.layouts import PaddedLayout
from trainer.tasks import BUILT_IN

Answer = tuple[int, ...]

OBJECTIVES = [  # task, smoothing, weight of the error, the loss, and what the error's probabilities are
    pytest.param("meld", 0.2, 0.0, "full", "full", id="smoothed-classes"),
    pytest.param("mosei", 0.2, 0.0, "full", "full", id="smoothed-numbers"),
    pytest.param("mosei", 0.0, 1.5, "full", "full", id="error", marks=pytest.mark.slow),  # a part of the next
    pytest.param("mosei", 0.1, 0.7, "full", "full", id="smoothed-and-error"),
    pytest.param("mosei", 0.1, 0.7, "full", "constrained", id="constrained-error"),
    pytest.param("meld", 0.0, 0.0, "constrained", "constrained", id="constrained-classes"),
    pytest.param("meld", 0.2, 0.0, "constrained", "constrained", id="smoothed-constrained-classes"),
    pytest.param("mosei", 0.1, 0.7, "constrained", "constrained", id="constrained-numbers-and-error"),
    pytest.param("mosei", 0.0, 0.7, "constrained", "full", id="constrained-numbers-and-full-error"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def collator(
    model: EGMF, task: str, smoothing: float = 0.0, error: float = 0.0, loss: Score = "full", score: Score = "full"
) -> Collator:
    tree = task_tree(BUILT_IN[task], model.backbone.tokenizer, "words", "en")
    return Collator(
        BUILT_IN[task], model.backbone.tokenizer, DataConfig(), widths=WIDTHS, rates={}, pseudo_tokens=3,
        modalities=("text", "audio", "video"), objective=Objective(None, smoothing, error, tree, loss=loss, score=score),
    )  # fmt: skip


def plain_loss(
    model: EGMF, collate: Collator, sample: Any, smoothing: float, error: float, kind: Score, score: Score
) -> Tensor:
    """By the definition: no tree, no packing, no padding, a row per answer."""
    task, answers = collate.task, [tuple(answer) for answer in collate.answers]
    batch = Collator(
        task, collate.tokenizer, DataConfig(), widths=WIDTHS, rates={}, pseudo_tokens=3, modalities=collate.modalities
    )([sample], answers=False)
    context = model.embed(PaddedLayout(batch))[0][0]
    truth = task.answer_index(sample.target)
    found = answer_logprobs(model, context, answers if error else [answers[truth]])

    def logprobs(answer: Answer, i: int, kind: Score) -> dict[int, Tensor]:
        others = sorted({a[i] for a in answers if a[:i] == answer[:i]})
        listed = found[answer][i, others]
        return dict(zip(others, listed if kind == "full" else listed.log_softmax(0), strict=True))

    loss = torch.zeros((), dtype=torch.float64)
    for i, token in enumerate(answers[truth]):
        at = logprobs(answers[truth], i, kind)
        loss = loss - (1 - smoothing) * at[token] - smoothing * sum(at.values()) / len(at)
    if error:
        scores = [sum(logprobs(a, i, score)[token] for i, token in enumerate(a)) for a in answers]
        probability = torch.stack(scores).softmax(0)
        distance = torch.tensor([abs(value - sample.target) for value in task.grid.values], dtype=torch.float64)
        loss = loss + error * (probability * distance).sum()
    return loss


def answer_logprobs(model: EGMF, context: Tensor, answers: Sequence[Answer]) -> dict[Answer, Tensor]:
    """log p(token) at every place of each answer, a row per answer; those of the same length in one pass, so without padding."""
    out = {}
    for length in sorted(set(map(len, answers))):
        same_length = [answer for answer in answers if len(answer) == length]
        tails = model.backbone.embed(torch.tensor([answer[:-1] for answer in same_length], dtype=torch.long))
        rows = torch.cat([context.expand(len(same_length), -1, -1), tails], dim=1)
        logits = model.backbone.model(inputs_embeds=rows, use_cache=False).logits
        places = logits[:, context.shape[0] - 1 :].double().log_softmax(-1)
        out |= dict(zip(same_length, places, strict=True))
    return out


def weighted(loss_B: Tensor) -> Tensor:
    return loss_B.double() * torch.linspace(0.5, 1.5, len(loss_B), dtype=torch.float64)


def gradients(model: EGMF, loss_B: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weighted(loss_B).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(("task", "smoothing", "error", "loss", "score"), OBJECTIVES)
def test_packed_padded_and_single_samples_give_the_defined_loss_and_gradients(
    folder: Path, task: str, smoothing: float, error: float, loss: Score, score: Score
) -> None:
    model = make(folder).train()
    collate, sample_list = collator(model, task, smoothing, error, loss, score), samples(task)
    expected_B = torch.stack(
        [plain_loss(model, collate, sample, smoothing, error, loss, score) for sample in sample_list]
    )
    scale = magnitudes(model, list(weighted(expected_B)))
    reference = gradients(model, expected_B)
    ways = {
        "packed": lambda: model(collate.pack(sample_list, [2, 0, 4])).loss_B,
        "padded": lambda: model(collate(sample_list)).loss_B,
        "alone": lambda: torch.cat([model(collate.pack([sample])).loss_B for sample in sample_list]),
    }
    for way, run in ways.items():
        loss_B = run()
        torch.testing.assert_close(loss_B.double(), expected_B, atol=1e-5, rtol=1e-6, msg=lambda m, w=way: f"{w}: {m}")
        got = gradients(model, loss_B)
        assert got.keys() == reference.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(
                gradient / scale[name], reference[name] / scale[name], atol=1e-5, rtol=0,
                msg=lambda m, w=way, n=name: f"{w}: {n}: {m}",
            )  # fmt: skip
    plain = model(collator(model, task).pack(sample_list)).loss_B
    assert (plain - expected_B).abs().min() > 1e-3  # the objective does something to every sample


def test_smoothing_leaves_tokens_without_a_choice_alone(folder: Path) -> None:
    """Where only one answer goes on, its tokens have a plain loss: no probability is lost to the vocabulary."""
    collate = collator(make(folder), "meld", 0.3)
    choices = collate.pack(samples()).choices
    assert choices is not None
    starts = {answer[0] for answer in collate.answers}
    tokens = choices.token_m[choices.option_nW]
    rows = [row[mask].tolist() for row, mask in zip(tokens, choices.mask_nW, strict=True)]
    assert set(rows[0]) == starts
    logits = torch.randn(len(rows), 320)
    from trainer.models.losses import token_nll

    ids = collate.pack(samples()).answer_id_n
    smoothed, plain = token_nll(logits, ids, choices), token_nll(logits, ids, None)
    alone = torch.tensor([len(row) == 1 for row in rows])
    assert alone.any()
    torch.testing.assert_close(smoothed[alone], plain[alone])
    assert ((smoothed - plain).abs() > 1e-3)[~alone].all()


def test_smoothing_never_waits_for_the_device(folder: Path) -> None:
    model = make(folder).train()
    for loss in ("full", "constrained"):
        collate = collator(model, "meld", 0.2, loss=loss)
        for batch in (collate.pack(samples()), collate(samples())):
            with Waits() as seen:
                model(batch).loss_B.sum().backward()
            assert seen.found == []


def test_scoring_knows_nothing_of_the_objective(folder: Path) -> None:
    model = make(folder).eval()
    trie = task_tree(BUILT_IN["mosei"], model.backbone.tokenizer, "words", "en").trie("constrained")
    with torch.no_grad():
        scores = [
            model(collator(model, "mosei", *extra).pack(samples("mosei"), trie=trie)).logprob_BC
            for extra in ((), (0.2, 1.0))
        ]
    assert torch.equal(*scores)


def test_logits_of_the_tree_are_made_in_parts_and_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(folder).train()
    collate, sample_list = collator(model, "mosei", 0.0, 1.0), samples("mosei")
    monkeypatch.setattr("trainer.models.trie_scores.MAX_LOGITS", 40 * model.backbone.vocabulary)
    batch = collate.pack(sample_list)
    with Logits(model) as seen:
        model(batch).loss_B.sum().backward()
    assert max(shape[0] for shape in seen.shapes) <= 40 < len(batch.own_ids_T)
