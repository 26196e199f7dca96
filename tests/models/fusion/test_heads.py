"""Expert heads: what each expert alone says of the answer, and what experts and gate learn from it."""

from __future__ import annotations

import pytest
import torch

from tests.models.fusion.fusion_cases import ANSWERS, INPUTS, H, backward, config, fusion, inputs, spoil
from trainer.models.fusion.heads import ExpertHeads, expert_losses
from trainer.models.fusion.network import Fusion

NAMES = ("local", "semantic", "global")


def heads(dtype=torch.float64):
    torch.manual_seed(0)
    made = ExpertHeads(NAMES, 3, 8, {"meld": 7, "mosi": 61}).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def values(B=5, K=3, E=3, M=2, D=8):
    g = torch.Generator().manual_seed(1)
    value_BKEMD = torch.randn(B, K, E, M, D, generator=g, dtype=torch.float64)
    weight_BKEM = torch.rand(B, K, E, M, generator=g, dtype=torch.float64)
    valid_BEM = torch.rand(B, E, M, generator=g) < 0.7
    valid_BEM[0] = False
    return value_BKEMD, weight_BKEM, valid_BEM


@pytest.mark.parametrize(("task", "part"), [("meld", slice(0, 7)), ("mosi", slice(7, 68))])
def test_a_head_reads_its_own_experts_mixed_vectors(task, part):
    """Against sums written out, sample by sample."""
    net = heads()
    value_BKEMD, weight_BKEM, valid_BEM = values()
    unread = value_BKEMD.masked_fill(~valid_BEM[:, None, :, :, None], float("nan"))
    found = net(list(unread.flatten(2, 3).unbind(2)), weight_BKEM, valid_BEM, task)
    assert found.dtype == torch.float32
    assert found.shape == (5, 3, part.stop - part.start)
    for b in range(5):
        for e, name in enumerate(NAMES):
            vector = torch.zeros(3, 8, dtype=torch.float64)
            for m in range(2):
                if valid_BEM[b, e, m]:
                    vector += weight_BKEM[b, :, e, m, None] * value_BKEMD[b, :, e, m]
            layer = net.linear[name]
            logits = layer.weight[part] @ vector.flatten() + layer.bias[part]
            torch.testing.assert_close(found[b, e].double(), logits.log_softmax(0), atol=1e-5, rtol=1e-5)


def test_heads_start_with_equal_logits_for_all_answers():
    net = ExpertHeads(NAMES, 3, 8, {"meld": 7, "mosi": 61}).double()
    value_BKEMD, weight_BKEM, valid_BEM = values()
    found = net(list(value_BKEMD.flatten(2, 3).unbind(2)), weight_BKEM, valid_BEM, "meld")
    torch.testing.assert_close(found.exp(), torch.full((5, 3, 7), 1 / 7))


def test_losses_are_the_mean_of_the_experts_and_the_mixtures():
    g = torch.Generator().manual_seed(0)
    logprob = torch.randn(4, 3, 7, generator=g).log_softmax(-1)
    gate = torch.rand(4, 2, 3, generator=g)
    valid = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [False, False, False]])
    gate = gate * valid[:, None]
    gate = gate / gate.sum(-1, keepdim=True).clamp(min=1e-9)
    answer = torch.tensor([3, 0, 6, 2])
    experts_B, gate_B = expert_losses(logprob, answer, gate, valid)
    for b in range(4):
        kept = [e for e in range(3) if valid[b, e]]
        output = [float(logprob[b, e, answer[b]]) for e in kept]
        trust = [float(gate[b, :, e].mean()) for e in kept]
        mixed = (
            sum(p * torch.tensor(s).exp() for p, s in zip(trust, output, strict=True)) if kept else torch.tensor(1.0)
        )
        assert float(experts_B[b]) == pytest.approx(-sum(output) / len(output) if kept else 0.0, abs=1e-6)
        assert float(gate_B[b]) == pytest.approx(-float(mixed.log()), abs=1e-6)


def test_the_gates_gradient_is_its_distance_from_the_experts_shares():
    """d loss / d logit_e = p_e - p_e q_e / sum p q, and the experts get none of it."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=g, dtype=torch.float64).requires_grad_()
    logprob = torch.randn(6, 3, 4, generator=g).log_softmax(-1).requires_grad_()
    answer, valid = torch.arange(6) % 4, torch.ones(6, 3, dtype=torch.bool)
    p = logits.softmax(-1)
    _, gate_B = expert_losses(logprob, answer, p[:, None].expand(-1, 2, -1), valid)
    found, none = torch.autograd.grad(gate_B.sum(), [logits, logprob], allow_unused=True)
    assert none is None
    q = logprob.exp()[torch.arange(6), :, answer].double()
    torch.testing.assert_close(found, (p - p * q / (p * q).sum(1, keepdim=True)).detach(), atol=1e-6, rtol=1e-5)


def test_where_experts_know_equally_much_the_gate_learns_nothing():
    logits = torch.randn(6, 3, requires_grad=True)
    same = torch.randn(6, 1, 4).log_softmax(-1).expand(-1, 3, -1)
    _, gate_B = expert_losses(same, torch.zeros(6, dtype=torch.long), logits.softmax(-1)[:, None], torch.ones(6, 3) > 0)
    (found,) = torch.autograd.grad(gate_B.sum(), logits)
    torch.testing.assert_close(found, torch.zeros(6, 3), atol=1e-6, rtol=0)


def test_an_expert_learns_whatever_its_weight():
    logprob = torch.randn(4, 3, 5).log_softmax(-1).requires_grad_()
    gate = torch.tensor([1.0, 0.0, 0.0]).expand(4, 2, 3)
    terms = expert_losses(logprob, torch.arange(4), gate, torch.ones(4, 3) > 0)
    (found,) = torch.autograd.grad(sum(term.sum() for term in terms), logprob)
    torch.testing.assert_close(found[torch.arange(4), :, torch.arange(4)], torch.full((4, 3), -1 / 3))


def test_what_is_not_valid_changes_nothing_and_gets_no_gradient():
    net = fusion()
    batch = inputs(present=(True, True, False))
    clean, wanted = backward(net, batch)
    dirty, found = backward(net, spoil(batch))
    assert torch.equal(clean.expert_logprob_BEC, dirty.expert_logprob_BEC)
    for name, reference in wanted.items():
        assert torch.equal(reference, found[name]), name


def test_every_head_has_a_gradient_whatever_the_task_and_whatever_is_missing():
    net = fusion()
    for present in ((True, True, True), (True, False, False), (False, False, False)):
        _, gradients = backward(net, inputs("mosi", present=present))
        assert all(gradients[f"heads.linear.{name}.weight"] is not None for name in net.experts_built), present


def test_no_weight_no_heads():
    net = fusion(expert_loss_weight=0.0)
    assert not any(name.startswith("heads") for name in net.state_dict())
    assert net(*inputs()).expert_logprob_BEC is None


def test_heads_need_the_number_of_answers():
    for answers in (None, {"meld": 7}):
        with pytest.raises(ValueError, match="number of answers of every task"):
            Fusion(config(), INPUTS, H, H, 1.0, answers)
    Fusion(config(), INPUTS, H, H, 1.0, ANSWERS)
