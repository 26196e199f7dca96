"""The gate: what it weighs, what it counts, and what stays float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.fusion.fusion_cases import config, streams
from trainer.kernels.gate import gate_mix
from trainer.models.fusion.expert import presence
from trainer.models.fusion.float32_buffers import Float32Buffers
from trainer.models.fusion.gating import Context, HierarchicalGate

ALL = ("text", "audio", "video")
NAMES = ("local", "semantic", "global")
LENGTHS = [[6, 11, 7], [3, 5, 0], [0, 4, 0], [0, 0, 0]]


def build(seed=0, awake=True, tasks=2, experts=NAMES, modalities=ALL, gate=None, **changes):
    torch.manual_seed(seed)
    net = HierarchicalGate(config(gate=gate or {}, **changes), experts, modalities, tasks)
    if awake:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
    return net


def inputs(lengths=LENGTHS, K=3, seed=0):
    given = streams(lengths, dtype=torch.float32, seed=seed)
    present = presence(given)
    valid = torch.stack([present, present & (present.sum(1, keepdim=True) > 1), present], 1)
    values = torch.randn(len(lengths), K, 3, 3, 8, generator=torch.Generator().manual_seed(seed))
    return list(values.flatten(2, 3).unbind(2)), valid, given


def test_starts_even_over_what_is_valid():
    _, expert_BKE, modality_BKEM = build(awake=False)(*inputs(), 0)
    torch.testing.assert_close(expert_BKE[0], torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(modality_BKEM[0], torch.full((3, 3, 3), 1 / 3))
    torch.testing.assert_close(modality_BKEM[1, 0, 0], torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(expert_BKE[2, 0], torch.tensor([0.5, 0.0, 0.5]))
    assert not expert_BKE[3].any()


def test_equals_the_formula():
    """y = RMSNorm(sum g2 g1 x + slot + W_c c), logits from GELU(W (c + slot))."""
    net = build()
    values, valid, given = inputs()
    y, expert_BKE, modality_BKEM = net(values, valid, given, 1)
    c = net.context(given, 1)
    for k in range(3):
        z = nn.functional.gelu(net.hidden(c + net.slot_KD[k]))
        logits1 = net.modality(z).view(4, 3, 3)
        logits2 = net.expert(z)
        for b in range(4):
            total = net.slot_KD[k] + net.residual(c[b])
            some = valid[b].any(-1)
            if some.any():
                g2 = torch.softmax(logits2[b].masked_fill(~some, -torch.inf), -1)
                torch.testing.assert_close(expert_BKE[b, k], g2)
                for e in torch.nonzero(some)[:, 0]:
                    g1 = torch.softmax(logits1[b, e].masked_fill(~valid[b, e], -torch.inf), -1)
                    torch.testing.assert_close(modality_BKEM[b, k, e], g1)
                    total = total + g2[e] * sum(g1[m] * values[e * 3 + m][b, k] for m in range(3))
            expected = total / torch.sqrt(total.square().mean() + 1e-6) * net.weight_D
            torch.testing.assert_close(y[b, k], expected, atol=2e-5, rtol=1e-4)


def test_temperature_flattens():
    sharp, flat = build(gate={"temperature": 0.1}), build(gate={"temperature": 10.0})
    args = inputs()
    assert sharp(*args, 0)[1][0].amax() > flat(*args, 0)[1][0].amax()


@pytest.mark.parametrize("level", ["modality", "expert"])
def test_a_level_replaced_by_the_mean(level):
    net = build(gate={level: "mean"})
    assert not hasattr(net, level)
    _, expert_BKE, modality_BKEM = net(*inputs(), 0)
    got = modality_BKEM[1, :, 0] if level == "modality" else expert_BKE[2]
    expected = torch.tensor([0.5, 0.5, 0.0] if level == "modality" else [0.5, 0.0, 0.5])
    torch.testing.assert_close(got, expected.expand(3, 3))
    other = expert_BKE[0] if level == "modality" else modality_BKEM[0, :, 0]
    assert other.std() > 1e-3  # the learned level stays learned


def test_both_means_need_no_logits():
    net = build(gate={"modality": "mean", "expert": "mean"})
    assert not any(name.startswith(("hidden", "modality", "expert")) for name, _ in net.named_parameters())
    y = net(*inputs(), 0).mixed_BKD
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_context_knows_what_is_missing_and_the_task():
    torch.manual_seed(0)
    net = Context(config(), ALL, 2)
    given = streams(LENGTHS, dtype=torch.float32)
    c = net(given, 0)
    assert (c - net(given, 1)).abs().max() > 1e-3
    with torch.no_grad():
        net.missing_MS[2] += 1.0  # of video
    moved = (c - net(given, 0)).abs().amax(1)
    assert moved[0] == 0
    assert (moved[1:] > 1e-3).all()


def test_context_equals_numpy():
    torch.manual_seed(0)
    net = Context(config(), ALL, 2).double()
    given = streams(LENGTHS)
    c = net(given, 1)
    weight, bias = net.project.weight.detach().numpy(), net.project.bias.detach().numpy()
    for b in range(4):
        parts = []
        for i, (m, s) in enumerate(given.items()):
            length = LENGTHS[b][ALL.index(m)]
            seen = s.content_BTD[b, :length].numpy()
            result = (
                [seen.mean(0), np.log(np.sqrt(seen.var(0) + 1e-5))] if length else [net.missing_MS[i].detach().numpy()]
            )
            parts += result
        raw = weight @ np.concatenate([*parts, net.task.weight[1].detach().numpy()]) + bias
        np.testing.assert_allclose(c[b].detach().numpy(), (raw - raw.mean()) / np.sqrt(raw.var() + 1e-5), atol=1e-10)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_usage_stays_float32(cast):
    net = nn.ModuleList([build()])
    net[0].usage_E.copy_(torch.tensor([0.1, 0.2, 0.7]))
    before = net[0].usage_E.clone()
    net = net.to(torch.bfloat16) if cast == "to" else getattr(net, cast)()
    assert net[0].slot_KD.dtype != torch.float32
    for name, buffer in net.named_buffers():
        assert buffer.dtype == torch.float32, name
    assert torch.equal(net[0].usage_E, before)  # and did not lose digits on the way
    y, expert_BKE, _ = net[0](
        [x.to(net[0].slot_KD.dtype) for x in inputs()[0]], *_half(inputs(), net[0].slot_KD.dtype), 0
    )
    assert torch.isfinite(y).all()
    assert net[0].balance_loss(expert_BKE).dtype == torch.float32


def _half(args, dtype):
    _, valid, given = args
    return valid, {m: type(s)(*(t.to(dtype) if t.is_floating_point() else t for t in s)) for m, s in given.items()}


def test_float32_buffers_follow_the_device_and_leave_integers_alone():
    net = Float32Buffers()
    net.register_buffer("number", torch.ones(2))
    net.register_buffer("count", torch.ones(2, dtype=torch.long))
    assert net.half().count.dtype == torch.long
    moved = net.to("meta")
    assert moved.number.device.type == "meta"
    assert moved.number.dtype == torch.float32


def test_usage_is_saved_and_the_steps_own_sums_are_not():
    net = build()
    net.usage_E.copy_(torch.tensor([0.5, 0.3, 0.2]))
    state = net.state_dict()
    assert "usage_E" in state
    assert not any(name.startswith("step_") for name in state)
    other = build(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.usage_E, net.usage_E)


def random_gate(B, K=3, E=3, seed=0):
    return torch.rand(B, K, E, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_usage_is_the_exponential_average_of_weighted_means():
    net = build(gate={"usage_decay": 0.8})
    expected = np.full(3, 1 / 3)
    np.testing.assert_allclose(net.usage_E, expected, atol=1e-7)
    for step in range(4):
        gate, weight = random_gate(5, seed=step), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])
        net.accumulate(gate, weight)
        net.update_usage()
        mean = (gate.mean(1) * weight[:, None]).sum(0).numpy() / 4.5
        expected = 0.8 * expected + 0.2 * mean
        np.testing.assert_allclose(net.usage_E, expected, atol=1e-6)


def test_usage_does_not_know_micro_batches_or_ranks():
    gate, weight = random_gate(12), torch.rand(12)
    whole = build()
    whole.accumulate(gate, weight)
    whole.update_usage()

    cut = build()
    for part in (slice(0, 1), slice(1, 7), slice(7, 12)):
        cut.accumulate(gate[part], weight[part])
    cut.update_usage()
    torch.testing.assert_close(whole.usage_E, cut.usage_E, atol=1e-6, rtol=0)

    ranks = [build(), build()]
    for rank, part in zip(ranks, (slice(0, 4), slice(4, 12)), strict=True):
        rank.accumulate(gate[part], weight[part])
    total = sum(r.collected() for r in ranks)
    calls = []
    for rank in ranks:
        rank.update_usage(lambda t: (calls.append(t.shape), t.copy_(total)))
    assert calls == [torch.Size([4])] * 2  # once a step, sums and weight together
    for rank in ranks:
        torch.testing.assert_close(whole.usage_E, rank.usage_E, atol=1e-6, rtol=0)


def test_a_step_without_weight_changes_nothing_and_steps_do_not_add_up():
    net = build()
    net.accumulate(random_gate(3), torch.ones(3))
    net.update_usage()
    before = net.usage_E.clone()
    net.update_usage()
    net.accumulate(random_gate(3, seed=4), torch.zeros(3))
    net.update_usage()
    assert torch.equal(before, net.usage_E)


def test_balance_loss():
    net = build()
    net.usage_E.copy_(torch.tensor([0.6, 0.3, 0.1]))
    gate = random_gate(4).requires_grad_()
    loss = net.balance_loss(gate)
    expected = 3 * (gate.detach().mean(1) * torch.tensor([0.6, 0.3, 0.1])).sum(1)
    torch.testing.assert_close(loss.detach(), expected)
    parts = torch.cat([net.balance_loss(gate[:1]), net.balance_loss(gate[1:])])
    torch.testing.assert_close(parts, loss)
    torch.testing.assert_close(net.balance_loss(torch.full((1, 3, 3), 1 / 3)), torch.ones(1))
    loss.sum().backward()
    assert gate.grad[0, 0, 0] > gate.grad[0, 0, 2]  # the busy expert is pushed down most


def test_usage_may_move_before_the_backward_pass():
    """Gradient checkpointing and callers in another order must not fail on a buffer changed in place."""
    net = build()
    gate = random_gate(4).requires_grad_()
    loss = net.balance_loss(gate).sum()
    net.accumulate(gate, torch.ones(4))
    net.update_usage()
    loss.backward()
    torch.testing.assert_close(gate.grad, torch.full((4, 3, 3), 1 / 3))


def test_removed_experts_and_modalities_have_no_place():
    net = build(experts=("local", "global"), modalities=("text", "audio"))
    values, valid, given = inputs()
    given.pop("video")
    _, expert_BKE, modality_BKEM = net([values[i] for i in (0, 1, 6, 7)], valid[:, [0, 2], :2], given, 0)
    assert expert_BKE.shape == (4, 3, 2)
    assert modality_BKEM.shape == (4, 3, 2, 2)
    assert net.usage_E.tolist() == [0.5, 0.5]
    assert net.context.missing_MS.shape == (2, 16)


def test_the_mix_is_the_kernel(monkeypatch):
    """One function does the mix, so that a kernel can take its place."""
    calls = []
    monkeypatch.setattr(
        "trainer.models.fusion.gating.gate_mix", lambda *a, **k: (calls.append(k), gate_mix(*a, **k))[1]
    )
    build(gate={"temperature": 0.5, "expert": "mean"})(*inputs(), 0)
    assert calls == [{"temperature": 0.5, "mean_modality": False, "mean_expert": True, "kernel": "auto"}]
