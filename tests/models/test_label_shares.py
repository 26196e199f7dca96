"""Losses and probabilities of samples with several labels or with shares of labels, by brute force: every answer in a row of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.tiny_models import load, save_family
from trainer.answer_tree import Score
from trainer.answers.predictions import predict
from trainer.answers.tree import task_tree
from trainer.batch import Sample
from trainer.config import DataConfig, FusionConfig
from trainer.data.collate import Collator
from trainer.data.objective import Objective
from trainer.label_sets import encode_set
from trainer.models.egmf import EGMF
from trainer.models.fusion.heads import expert_losses
from trainer.models.fusion.network import Fusion
from trainer.tasks import Task, define_task
from trainer.text import encode

LABELS = ["joy", "joyful", "anger", "happy anger"]  # one begins as another does
SETS = define_task({"name": "sets", "kind": "multilabel", "labels": LABELS})
SHARES = define_task({"name": "shares", "kind": "classification", "labels": LABELS})
WIDTHS = {"audio": 3, "video": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def text_model(folder: Path) -> EGMF:
    return EGMF(load(folder), None)


def samples(task: Task) -> list[Sample]:
    texts = ["so happy", "what on earth are you doing there", "no", "我很高兴 well"]
    if task.kind == "multilabel":
        return [
            Sample(f"s{i}", t, encode_set(s))
            for i, (t, s) in enumerate(zip(texts, ([0], [1, 3], [], [0, 1, 2, 3]), strict=True))
        ]
    shares = [[0.5, 0.25, 0.0, 0.25], None, [0.0, 0.0, 0.9, 0.1], [0.4, 0.4, 0.2, 0.0]]
    return [
        Sample(f"s{i}", t, 2.0 if q is None else float(np.argmax(q)), share_C=None if q is None else np.array(q, "f4"))
        for i, (t, q) in enumerate(zip(texts, shares, strict=True))
    ]


def collator(
    model: EGMF, task: Task, smoothing: float = 0.0, style: str = "words", pseudo_tokens: int = 0, loss: Score = "full"
) -> Collator:
    tokenizer = model.backbone.tokenizer
    tree = task_tree(task, tokenizer, style, "en")
    return Collator(
        task, tokenizer, DataConfig(answers=style), widths=WIDTHS, rates={}, pseudo_tokens=pseudo_tokens,
        modalities=("text", "audio", "video"), objective=Objective(smoothing=smoothing, tree=tree, shared=True, loss=loss),
    )  # fmt: skip


@torch.no_grad()
def answer_logprob(
    model: EGMF, collate: Collator, sample: Sample, others: list[str], answer: str, given: bool, score: Score
) -> float:
    """log p of an answer, end token included, in a row of its own and in float64: in the vocabulary, or among the tokens with which it
    or one of `others` goes on; `given`, of what it has not in common with them."""
    batch = collate([sample])
    prompt = batch.input_ids_BL[0, : int(batch.context_length_B[0])].tolist()
    tokens, *rows = ([*encode(model.backbone.tokenizer, text), collate.end] for text in [answer, *others])
    start = 0
    while given and all(tokens[start] == row[start] for row in rows):
        start += 1
    logits = model.backbone.base(input_ids=torch.tensor([prompt + tokens])).logits[0].double()[len(prompt) - 1 :]
    total = 0.0
    for i in range(start, len(tokens)):
        following = sorted({row[i] for row in [tokens, *rows] if row[:i] == tokens[:i]})
        among = logits[i] if score == "full" else logits[i, following]
        total += float(logits[i, tokens[i]] - among.logsumexp(0))
    return total


def by_hand(model: EGMF, collate: Collator, sample: Sample, score: Score = "full") -> np.ndarray:
    """[C]: the score of every answer of the task; of a multi-label task, given its label."""
    texts = collate.task.answer_texts(collate.config.answers, "en")
    pairs = collate.task.kind == "multilabel"
    others = [[texts[i ^ 1]] if pairs else [t for t in texts if t != text] for i, text in enumerate(texts)]
    return np.array(
        [answer_logprob(model, collate, sample, o, t, pairs, score) for o, t in zip(others, texts, strict=True)]
    )


@pytest.mark.parametrize("loss", ["full", "constrained"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    ("task", "smoothing", "style"),
    [(SETS, 0.0, "words"), (SETS, 0.2, "indices"), (SHARES, 0.0, "words"), (SHARES, 0.2, "words")],
)
def test_the_loss_is_the_cross_entropy_of_answers_in_rows_of_their_own(
    folder: Path, task: Task, smoothing: float, style: str, layout: str, loss: Score
) -> None:
    model = text_model(folder).eval()
    collate, listed = collator(model, task, smoothing, style, loss=loss), samples(task)
    batch = collate.pack(listed) if layout == "packed" else collate(listed)
    expected = []
    for sample in listed:
        logprob_C = by_hand(model, collate, sample, loss)
        if task.kind == "multilabel":
            applies = np.array([int(sample.target) >> i & 1 for i in range(len(LABELS))], float)
            share_C = np.stack([applies, 1 - applies], 1).ravel() * (1 - smoothing) + smoothing / 2
        else:
            one_hot = np.eye(len(LABELS))[int(sample.target)]
            share_C = (one_hot if sample.share_C is None else sample.share_C) * (1 - smoothing) + smoothing / len(
                LABELS
            )
        expected.append(-(share_C * logprob_C).sum())
    with torch.no_grad():
        loss_B = model(batch).loss_B
    assert loss_B.numpy() == pytest.approx(np.array(expected), abs=2e-4)


def test_a_sample_with_one_label_has_the_loss_of_its_answer_and_its_gradient(folder: Path) -> None:
    model = text_model(folder).train()
    shared, listed = collator(model, SHARES), [sample for sample in samples(SHARES) if sample.share_C is None]
    plain = Collator(
        SHARES, model.backbone.tokenizer, DataConfig(), widths=WIDTHS, rates={}, pseudo_tokens=0, modalities=("text",)
    )
    found = []
    for collate in (shared, plain):
        model.zero_grad()
        loss = model(collate.pack(listed)).loss_B.sum()
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (of_answer, of_answer_gradients) = found
    assert float(loss) == pytest.approx(float(of_answer), rel=1e-5)
    assert gradients.keys() == of_answer_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_answer_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["full", "constrained"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_probability_of_a_label_is_that_of_yes_against_no(folder: Path, layout: str, score: Score) -> None:
    model = text_model(folder).eval()
    collate, listed = collator(model, SETS), samples(SETS)
    trie = task_tree(SETS, model.backbone.tokenizer, "words", "en").trie(score)
    with torch.no_grad():
        out = (
            model(collate.pack(listed, trie=trie))
            if layout == "packed"
            else model(collate(listed, answers=False), trie)
        )
    predictions = predict(SETS, out.logprob_BC)
    for b, sample in enumerate(listed):
        yes_C, no_C = by_hand(model, collate, sample, score).reshape(-1, 2).T
        expected = 1 / (1 + np.exp(no_C - yes_C))
        assert predictions.probability_BC[b] == pytest.approx(expected, abs=1e-5)
        assert predictions.value_B[b] == encode_set(np.flatnonzero(expected >= 0.5).tolist())
        assert predictions.answers[b] == (", ".join(np.array(LABELS)[expected >= 0.5]) or "none")


def test_scores_of_a_diverged_model_are_no_set() -> None:
    score_BC = np.zeros((4, 8))
    score_BC[0, 3], score_BC[1, :2], score_BC[2, 5] = np.nan, -np.inf, np.inf
    predictions = predict(SETS, score_BC)
    assert predictions.valid_B.tolist() == [False, False, False, True]
    assert predictions.answers == ["", "", "", "joy, joyful, anger, happy anger"]  # a tie is yes


@pytest.mark.parametrize("task", [SETS, SHARES])
def test_heads_of_experts_learn_the_same_target(folder: Path, task: Task) -> None:
    backbone = load(folder)
    torch.manual_seed(5)
    paired = [task.name] if task.kind == "multilabel" else []
    count, H = len(task.answers()), backbone.hidden_size
    config = FusionConfig(width=32, heads=2, dropout=0.0, pseudo_tokens=3, expert_loss_weight=0.3)
    fusion = Fusion(config, {task.name: WIDTHS}, H, H, 1.0, {task.name: count}, paired)
    for parameter in fusion.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = EGMF(backbone, fusion).eval()
    collate, listed = collator(model, task, pseudo_tokens=3), samples(task)
    batch = collate.pack(listed)
    with torch.no_grad():
        fused = fusion(
            task.name,
            backbone.embed(batch.inputs[0].text_ids_BS),
            batch.inputs[0].text_mask_BS,
            batch.inputs[0].audio,
            batch.inputs[0].video,
        )
        output = model(batch)
    logprob_BEC = fused.expert_logprob_BEC
    groups = (logprob_BEC.exp().unflatten(-1, (-1, 2)) if paired else logprob_BEC.exp()[..., None, :]).sum(-1)
    torch.testing.assert_close(
        groups, torch.ones_like(groups)
    )  # a distribution over the answers, or over each label's two
    experts_B, gate_B = expert_losses(logprob_BEC, None, fused.gate_expert_BKE, fused.expert_valid_BE, batch.share_BC)
    for b in range(len(listed)):
        valid_E = fused.expert_valid_BE[b]
        log_q_E = np.array(
            [sum(float(s) * float(p) for s, p in zip(batch.share_BC[b], row, strict=True)) for row in logprob_BEC[b]]
        )[valid_E]
        assert float(experts_B[b]) == pytest.approx(-log_q_E.mean(), rel=1e-5)
        weight_E = fused.gate_expert_BKE[b].mean(0).numpy()[valid_E]
        assert float(gate_B[b]) == pytest.approx(-np.log((weight_E * np.exp(log_q_E)).sum()), rel=1e-5)
    torch.testing.assert_close(output.auxiliary_B, 0.3 * (experts_B + gate_B), rtol=1e-4, atol=1e-5)
