"""The whole fusion network: what is missing is exactly ignored, and every pass uses everything."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from tests.models.fusion.fusion_cases import INPUTS, PATTERNS, H, backward, fusion, inputs, spoil, total, widen
from trainer.batch import Features
from trainer.config import FusionConfig
from trainer.models.fusion.network import Fusion

TASKS = list(INPUTS)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shapes():
    net = fusion()
    out = net(*inputs())
    assert out.pseudo_BKH.shape == (3, 3, H)
    assert out.gate_expert_BKE.shape == (3, 3, 3)
    assert out.gate_modality_BKEM.shape == (3, 3, 3, 3)
    assert out.unused_param_zero.shape == ()
    assert net.experts_built == ("local", "semantic", "global")
    assert net.modalities == ("text", "audio", "video")


@pytest.mark.parametrize("pooling", ["max", "logsumexp"])
@pytest.mark.parametrize("present", PATTERNS, ids=str)
def test_content_under_the_mask_changes_nothing_bit_by_bit(present, pooling):
    net = fusion(local_pooling=pooling)
    batch = inputs(present=present)
    out, grads = backward(net, batch)
    assert all(torch.isfinite(t).all() for t in out)
    assert all(torch.isfinite(g).all() for g in grads.values())
    for value in (math.nan, math.inf, 1e30):
        other, others = backward(net, spoil(batch, value))
        assert same(out, other)
        assert same(grads.values(), others.values())


@pytest.mark.parametrize("present", PATTERNS, ids=str)
def test_padding_changes_nothing(present):
    net = fusion().double()
    batch = inputs(present=present, dtype=torch.float64)
    out, grads = backward(net, batch)
    wide, wides = backward(net, widen(batch))
    for a, b in zip((*out, *grads.values()), (*wide, *wides.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_samples_do_not_know_each_other():
    net = fusion().double()
    task, words, mask, audio, video = inputs(dtype=torch.float64)
    whole = net(task, words, mask, audio, video)

    def cut(f, b):
        return type(f)(f.values_BTF[b : b + 1], f.mask_BT[b : b + 1], f.time_BT[b : b + 1])

    for b in range(3):
        one = net(task, words[b : b + 1], mask[b : b + 1], cut(audio, b), cut(video, b))
        torch.testing.assert_close(one.pseudo_BKH[0], whole.pseudo_BKH[b], rtol=0, atol=1e-9)


@pytest.mark.parametrize("present", PATTERNS, ids=str)
def test_missing_modalities_weigh_nothing(present):
    out = fusion()(*inputs(present=present))
    for m, there in enumerate(present):
        assert bool(out.gate_modality_BKEM[..., m].any()) == there
    total = out.gate_expert_BKE.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, float(any(present))))
    if sum(present) == 1:
        assert not out.gate_expert_BKE[..., 1].any()  # nothing to relate


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("present", PATTERNS, ids=str)
def test_every_parameter_has_a_gradient_whatever_is_missing(task, present):
    net = fusion()
    net.zero_grad()
    out = net(*inputs(task, present))
    total(out).backward()
    without = [name for name, p in net.named_parameters() if p.grad is None]
    assert not without


def executed(net, batch):
    """The leaf modules of one pass, in the order in which they ran."""
    names, handles = [], []
    for name, module in net.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
    net(*batch)
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize(
    "changes", [{}, {"gate": {"modality": "mean", "expert": "mean"}}, {"experts": ["local"]}], ids=str
)
def test_every_pass_runs_the_same_modules_in_the_same_order(changes):
    net = fusion(**changes)
    runs = {tuple(executed(net, inputs(task, present))) for task in TASKS for present in PATTERNS}
    assert len(runs) == 1
    (ran,) = runs
    owners = {name.rpartition(".")[0] for name, _ in net.named_parameters()}
    assert set(ran) == owners


def test_parameters_are_used_by_their_own_module_only():
    """ZeRO-3 gathers a module's own parameters for its own forward: outside it they are empty."""
    net = fusion()
    hidden = {}

    def show(module, _):
        for p in module.parameters(recurse=False):
            p.data = hidden[id(p)]

    def hide(module, *_):
        for p in module.parameters(recurse=False):
            hidden[id(p)] = p.data
            p.data = torch.full_like(p.data, math.nan)

    reference = net(*inputs()).pseudo_BKH
    for module in net.modules():
        hide(module)
        module.register_forward_pre_hook(show)
        module.register_forward_hook(hide)
    assert torch.equal(net(*inputs()).pseudo_BKH, reference)


@pytest.mark.parametrize("expert", ["local", "semantic", "global"])
def test_an_ablated_expert_is_not_built(expert):
    kept = [name for name in ("local", "semantic", "global") if name != expert]
    net = fusion(experts=kept[::-1])
    assert net.experts_built == tuple(kept)
    assert not any(f"experts.{expert}." in name for name, _ in net.named_parameters())
    assert net(*inputs()).gate_expert_BKE.shape[-1] == 2
    _, grads = backward(net, inputs(present=(True, False, True)))
    assert all(g is not None for g in grads.values())


@pytest.mark.parametrize("modality", ["text", "audio", "video"])
def test_a_removed_modality_is_removed_everywhere(modality):
    kept = [name for name in ("text", "audio", "video") if name != modality]
    net = fusion(modalities=kept)
    assert net.modalities == tuple(kept)
    assert not any(f".{modality}." in name for name, _ in net.named_parameters())
    out, grads = backward(net, inputs())
    assert out.gate_modality_BKEM.shape[-1] == 2
    task, words, mask, audio, video = inputs()
    other = inputs(seed=50)
    swapped = {"text": (task, *other[1:3], audio, video), "audio": (task, words, mask, other[3], video)}
    spoiled, spoilt = backward(net, swapped.get(modality, (task, words, mask, audio, other[4])))
    assert same(out, spoiled)
    assert same(grads.values(), spoilt.values())


def test_a_modality_that_no_task_has_is_not_built():
    net = fusion(inputs={"mosi": {"audio": 4, "video": 0}})
    assert net.modalities == ("text", "audio")
    assert fusion(inputs={"mosi": {"audio": 4}}).modalities == ("text", "audio")


def test_text_alone_has_no_semantic_expert(caplog):
    with caplog.at_level(logging.WARNING):
        net = fusion(modalities=["text"])
    assert net.experts_built == ("local", "global")
    assert "semantic expert is left out" in caplog.text
    assert net(*inputs()).pseudo_BKH.shape == (3, 3, H)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"modalities": ["text"], "experts": ["semantic"]}, "there is only text"),
        ({"modalities": ["video"], "inputs": {"mosi": {"audio": 4, "video": 0}}}, "no task of this run has any"),
        ({"pseudo_tokens": 0}, "switches fusion off"),
        ({"inputs": {}}, "at least one task"),
    ],
    ids=str,
)
def test_networks_that_cannot_be(changes, match):
    with pytest.raises(ValueError, match=match):
        fusion(**changes)


def test_pseudo_tokens_start_as_long_as_embeddings():
    torch.manual_seed(0)
    net = Fusion(FusionConfig(width=64), INPUTS, H, 256, 0.7)
    batch = inputs()
    lengths = net(*batch).pseudo_BKH.norm(dim=-1)
    assert lengths.mean().item() == pytest.approx(0.7, rel=0.1)
    assert net.pseudo.linear.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert "pseudo.scale" in net.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net = fusion()
    reference = net(*inputs())
    net.to(dtype)
    out, grads = backward(net, inputs(dtype=dtype))
    assert out.pseudo_BKH.dtype == dtype
    assert out.unused_param_zero.dtype == torch.float32
    assert out.gate_expert_BKE.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in grads.values())
    torch.testing.assert_close(out.pseudo_BKH.float(), reference.pseudo_BKH, rtol=0, atol=0.25)
    torch.testing.assert_close(out.gate_expert_BKE, reference.gate_expert_BKE, rtol=0, atol=0.05)
    assert all(b.dtype == torch.float32 for b in net.buffers() if b.is_floating_point())


def test_names_are_stable():
    """Checkpoints are read by these names."""
    tops = {".".join(name.split(".")[:3]) for name in fusion().state_dict()}
    assert {
        "encoders.text.project",
        "encoders.meld.audio",
        "encoders.meld.video",
        "encoders.mosi.audio",
        "experts.local.streams",
        "experts.semantic.ask",
        "experts.semantic.source",
        "experts.global.blocks",
        "gate.context.missing_MS",
        "gate.slot_KD",
        "gate.usage_E",
        "gate.weight_D",
        "pseudo.linear.weight",
        "pseudo.scale",
    } <= tops


def test_eval_equals_train_without_dropout_and_dropout_is_off_in_eval():
    batch = inputs()
    net = fusion(dropout=0.5)
    net.eval()
    one, two = net(*batch), net(*batch)
    assert same(one, two)
    net.train()
    assert not torch.equal(net(*batch).pseudo_BKH, one.pseudo_BKH)


def test_learns_a_relation_between_audio_and_video():
    """Video shows one of four directions; audio says a class beside each, in random order; the answer is the class beside
    the one shown. Neither alone knows anything."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    n, keys = 4000, torch.nn.functional.one_hot(torch.rand(4000, 4, generator=g).argsort(1), 4).float()
    values = torch.rand(n, 4, generator=g).argsort(1)
    key_index = torch.randint(0, 4, (n,), generator=g)
    output = torch.cat([keys, torch.nn.functional.one_hot(values, 4).float()], -1) * 3
    audio = torch.randn(n, 12, 8, generator=g) * 0.3
    audio[:, 4:8] += output
    video = torch.randn(n, 6, 4, generator=g) * 0.3 + 3 * keys[torch.arange(n), key_index, None]
    label = values[torch.arange(n), key_index]

    net = Fusion(
        FusionConfig(
            width=32, heads=2, pseudo_tokens=2, dropout=0.0, experts=["semantic"], modalities=["audio", "video"]
        ),
        {"t": {"audio": 8, "video": 4}},
        H,
        16,
        4.0,
    )
    head = torch.nn.Linear(32, 4)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=5e-3)

    def score(rows):
        def given(x, rate):
            x = x[rows]
            return Features(
                x, torch.ones(x.shape[:2], dtype=torch.bool), (torch.arange(x.shape[1]) / rate).expand(x.shape[:2])
            )

        words = torch.zeros(len(rows), 1, H)
        return head(net("t", words, words[..., 0] > 1, given(audio, 10.0), given(video, 5.0)).pseudo_BKH.flatten(1))

    for _ in range(300):
        rows = torch.randint(0, 3500, (64,), generator=g)
        loss = torch.nn.functional.cross_entropy(score(rows), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    validation = torch.arange(3500, n)
    assert (score(validation).argmax(1) == label[validation]).float().mean() > 0.9
