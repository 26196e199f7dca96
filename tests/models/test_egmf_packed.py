"""Packed rows against the same samples one at a time: losses, every gradient, scores, and what is allocated on the way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny_models import load, save_family
from trainer.answer_tree import Score
from trainer.answers.tree import task_tree
from trainer.batch import Sample
from trainer.config import AdapterConfig, DataConfig, FusionConfig
from trainer.data.collate import Collator
from trainer.data.objective import Objective
from trainer.models.egmf import EGMF, LossOutput, ScoreOutput
from trainer.models.fusion.network import Fusion
from trainer.tasks import BUILT_IN

WIDTHS = {"audio": 3, "video": 2}
TEXTS = ["so happy", "", "what on earth are you doing there", "no", "我很高兴 well", "I know! I know, I know."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def make(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> EGMF:
    backbone = load(folder, dtype, **changes)
    torch.manual_seed(5)
    config = FusionConfig(width=32, heads=2, dropout=0.0, pseudo_tokens=3)
    H, answers = backbone.hidden_size, {"meld": 7, "mosei": 61}
    fusion = Fusion(config, {"meld": WIDTHS, "mosei": WIDTHS}, H, H, 1.0, answers)
    for parameter in fusion.gate.parameters():  # the gate's logits start at 0: an even gate hides faults
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return EGMF(backbone, fusion.to(dtype))


def collator(model: EGMF, task: str = "meld", objective: Objective | None = None) -> Collator:
    return Collator(
        BUILT_IN[task], model.backbone.tokenizer, DataConfig(),
        widths=WIDTHS, rates={}, pseudo_tokens=3, modalities=("text", "audio", "video"), objective=objective,
    )  # fmt: skip


def samples(task: str = "meld") -> list[Sample]:
    out = []
    for i, text in enumerate(TEXTS):
        rng = np.random.default_rng(i)
        audio, video = (rng.normal(size=(n, w)).astype("f4") for n, w in ((3 + 4 * i, 3), (9 - i, 2)))
        target = i % 7 if task == "meld" else (i - 3) / 2
        history = [("Ross", "hi there")] if i == 3 else []
        out.append(Sample(f"s{i}", text, target, audio if i != 2 else None, video if i != 4 else None, history=history))
    return out


def gradients(model: EGMF, outputs: Sequence[LossOutput]) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and every gradient of the weighted sum of losses."""
    weights = torch.linspace(0.5, 1.5, len(TEXTS))
    loss_B = torch.cat([out.loss_B for out in outputs])
    model.zero_grad()
    (
        (loss_B + torch.cat([out.auxiliary_B for out in outputs])) @ weights
        + sum(out.unused_param_zero for out in outputs)
    ).backward()
    return loss_B.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def magnitudes(model: EGMF, losses: Sequence[Tensor]) -> dict[str, float]:
    """Largest entry, over a parameter, of the sum over samples of |d loss / d parameter|: what rounding is relative to.

    A gradient is a sum over samples; where its terms cancel (a bias of the gate: what one sample adds another takes away),
    the error of a float32 sum stays that of the terms, however small the sum.
    """
    sums: dict[str, Tensor] = {}
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, torch.zeros_like(parameter)) + parameter.grad.abs()
    largest = max(float(total.max()) for total in sums.values())
    return {name: max(float(total.max()), 1e-3 * largest) for name, total in sums.items()}


BACKENDS = [
    pytest.param({}, id="plain"),
    pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
    pytest.param({"gradient_checkpointing": True, "reentrant": True}, id="reentrant"),
    pytest.param({"attention": "sdpa"}, id="mask"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loss_and_every_gradient_equal_the_samples_one_at_a_time(
    folder: Path, quantization: str, backend: dict[str, Any]
) -> None:
    model = make(folder, quantization=quantization, **backend).train()
    collate, sample_list = collator(model), samples()
    alone, reference = gradients(model, [model(collate([sample])) for sample in sample_list])
    weighted = zip(
        torch.linspace(0.5, 1.5, len(TEXTS)), (model(collate([sample])) for sample in sample_list), strict=True
    )
    scale = magnitudes(model, [w * (out.loss_B + out.auxiliary_B).sum() + out.unused_param_zero for w, out in weighted])
    for groups in ([6], [2, 1, 3], [1, 0, 5, 0]):
        packed, got = gradients(model, [model(collate.pack(sample_list, groups))])
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
        assert got.keys() == reference.keys()
        assert {n for n, p in model.named_parameters() if p.requires_grad} == got.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(
                gradient / scale[name],
                reference[name] / scale[name],
                atol=1e-5,
                rtol=0,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_bf16_losses_equal_the_samples_one_at_a_time(folder: Path) -> None:
    model = make(folder, torch.bfloat16).train()
    collate, sample_list = collator(model), samples()
    alone = torch.cat([model(collate([s]).to("cpu", torch.bfloat16)).loss_B for s in sample_list])
    packed = model(collate.pack(sample_list).to("cpu", torch.bfloat16)).loss_B
    torch.testing.assert_close(packed, alone, atol=0.15, rtol=0.02)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "varlen"])
def test_no_sample_reads_another(folder: Path, attention: str) -> None:
    """The gradient of one sample's loss with respect to another's features is exactly 0."""
    model = make(folder, attention=attention).train()
    row = collator(model).pack(samples())
    features = [row.inputs[0].audio, row.inputs[0].video]
    for feature in features:
        feature.values_BTF.requires_grad_()
    out = model(row)
    for b in range(len(TEXTS)):
        reached = torch.autograd.grad(out.loss_B[b], [f.values_BTF for f in features], retain_graph=True)
        for other in range(len(TEXTS)):
            found = [float(g[other].abs().sum()) for g in reached]
            assert (sum(found) > 0) == (other == b)


def test_groups_and_fillers_leave_gates_in_order(folder: Path) -> None:
    model = make(folder).eval()
    collate, sample_list = collator(model), samples()
    with torch.no_grad():
        whole, cut = (model(collate.pack(sample_list, groups)) for groups in ([6], [2, 0, 4]))
    torch.testing.assert_close(cut.gate_expert_BKE, whole.gate_expert_BKE)
    torch.testing.assert_close(cut.gate_modality_BKEM, whole.gate_modality_BKEM)
    assert whole.gate_expert_BKE.std(0).max() > 0.01


@pytest.mark.parametrize("score", ["full", "constrained"])
@pytest.mark.parametrize("task", ["meld", "mosei"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_those_of_padded_batches(folder: Path, task: str, dtype: torch.dtype, score: Score) -> None:
    model = make(folder, dtype).eval()
    collate, sample_list = collator(model, task), samples(task)
    trie = task_tree(BUILT_IN[task], model.backbone.tokenizer, "words", "en").trie(score)
    with torch.no_grad():
        row = collate.pack(sample_list, [2, 4], trie=trie).to("cpu", dtype)
        prefix = model.prefix(row.prefix_ids_P)
        first, again = (model(row, None, prefix) for _ in range(2))  # the cache does not grow
        whole, padded = model(row), model(collate(sample_list, answers=False).to("cpu", dtype), trie)
        alone = [model(collate.pack([s], trie=trie).to("cpu", dtype), None, prefix).logprob_BC for s in sample_list]
    assert isinstance(first, ScoreOutput)
    assert torch.equal(first.logprob_BC, again.logprob_BC)
    with torch.no_grad():
        precise = copy.deepcopy(model).float()(collate(sample_list, answers=False), trie).logprob_BC
    padding = float((padded.logprob_BC - precise).abs().max())  # what rounding costs where nothing is packed
    tolerance = 2e-5 if dtype == torch.float32 else 1.5 * padding + 2e-2
    for other in (first.logprob_BC, whole.logprob_BC, torch.cat(alone)):
        torch.testing.assert_close(other, precise, atol=tolerance, rtol=0)
    assert precise.std() > 0.5
    assert tolerance < 0.5


class Logits(TorchDispatchMode):
    """The shapes, ending in V, of all tensors that come to life under it; views of weights left out."""

    def __init__(self, model: EGMF) -> None:
        super().__init__()
        self.last, self.shapes = model.backbone.vocabulary, set[tuple[int, ...]]()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, Tensor) or not tensor.dim() or tensor.shape[-1] != self.last:
                continue
            if tensor.untyped_storage().data_ptr() not in self.weights:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_logits_exist_for_answers_alone(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary of 151,936 no tensor has more rows of logits than the batch has answer tokens."""
    V = 151_936
    folder = save_family("qwen2", tmp_path, vocab_size=V)
    model = make(folder, adapter=AdapterConfig(rank=2, dropout=0.0)).train()
    collate, sample_list = collator(model), samples()
    batch = collate.pack(sample_list) if layout == "packed" else collate(sample_list)
    wanted = len(batch.answer_id_n) if layout == "packed" else batch.answer_ids_BA.numel()
    with Logits(model) as seen:
        out = model(batch)
        out.loss_B.sum().backward()
    rows = {int(np.prod(shape[:-1])) for shape in seen.shapes}
    assert wanted in rows
    assert max(rows) <= wanted < batch.positions / 4
    tree = task_tree(BUILT_IN["meld"], model.backbone.tokenizer, "words", "en")
    trie = tree.trie("full")
    monkeypatch.setattr("trainer.models.trie_scores.MAX_LOGITS", 8 * V)
    model.eval()
    given = (
        (collate.pack(sample_list, trie=trie),) if layout == "packed" else (collate(sample_list, answers=False), trie)
    )
    with torch.no_grad(), Logits(model) as seen:
        model(*given)
    assert max(int(np.prod(shape[:-1])) for shape in seen.shapes) <= 8
    trie, collate = (
        tree.trie("constrained"),
        collator(model, objective=Objective(None, 0.1, tree=tree, loss="constrained")),
    )
    scored = collate.pack(sample_list, trie=trie) if layout == "packed" else collate(sample_list, answers=False)
    trained = collate.pack(sample_list) if layout == "packed" else collate(sample_list)
    with Logits(model) as seen:
        model(scored, None if layout == "packed" else trie).logprob_BC.sum().backward()
        model(trained).loss_B.sum().backward()
    assert not seen.shapes  # not one row of logits over the vocabulary


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """The operations under it that need numbers from the device before the host can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        lists = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in lists)
        unsized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITING or by_mask or unsized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_micro_step_never_waits_for_the_device(folder: Path, layout: str, attention: str) -> None:
    model = make(folder, attention=attention).train()
    collate, sample_list = collator(model), samples()
    batch = collate.pack(sample_list, [2, 0, 4]) if layout == "packed" else collate(sample_list)
    with Waits() as seen:
        out = model(batch)
        (out.loss_B.sum() + out.auxiliary_B.sum() + out.unused_param_zero).backward()
    assert seen.found == []
    with Waits() as seen:
        assert bool(torch.ones(3)[torch.tensor([True, False, True])].sum() > 1)
    assert seen.found == ["index", "_local_scalar_dense"]


def test_a_row_that_is_to_be_scored_has_no_loss(folder: Path) -> None:
    model = make(folder)
    row = copy.copy(collator(model).pack(samples()))
    row.answer_at_n = row.answer_at_n[:0]
    with pytest.raises(ValueError, match="without answers has no loss"):
        model(row)
    row = collator(model).pack(samples())
    row.place_BK = row.place_BK[:, :2]
    with pytest.raises(ValueError, match="keeps 2 places for pseudo tokens, the model makes 3"):
        model(row)
