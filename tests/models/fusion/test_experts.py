"""Each expert against loops over one sample at a time, its valid frames alone, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.models.fusion.fusion_cases import config, lengths_mask, stream, streams
from trainer.models.fusion.encoders import EncodedModality, sinusoidal_positions
from trainer.models.fusion.expert import Expert
from trainer.models.fusion.experts import (
    NEARNESS,
    SHARPNESS,
    FoldedCrossAttention,
    GlobalExpert,
    LocalExpert,
    SemanticExpert,
)
from trainer.models.fusion.masked import (
    SlotAttention,
    masked_attention,
    masked_mean,
    masked_scaled_logsumexp,
    masked_scaled_max,
    masked_window_mean,
    pool,
)

ALL = ("text", "audio", "video")
LENGTHS = [[6, 11, 7], [3, 5, 0], [0, 4, 0], [2, 0, 7], [0, 0, 0]]  # of text, audio, video; 0 is missing
PRESENT = np.array(LENGTHS) > 0
EXPERTS = [LocalExpert, SemanticExpert, GlobalExpert]


def build(kind, modalities=ALL, seed=0, **changes):
    """An expert with random gains and biases everywhere, in float64."""
    torch.manual_seed(seed)
    expert = kind(config(**changes), modalities).double()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return expert


def weights(module, name):
    found = dict(module.named_parameters())
    return found[name].detach().numpy()


def linear(x, module, name):
    name = f"{name}." if name else ""  # a layer itself has no name
    return weights(module, f"{name}weight") @ x + weights(module, f"{name}bias")


def norm(x, module, name):
    hat = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
    return hat * weights(module, f"{name}.weight") + weights(module, f"{name}.bias")


def gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in np.ravel(x)]).reshape(np.shape(x))


def softmax(x):
    raised = np.exp(np.array(x) - np.max(x))
    return raised / raised.sum()


def valid_frames(given, b):
    mask = given.mask_BT[b].numpy()
    return {name: getattr(given, f"{name}_BTD")[b].numpy()[mask] for name in ("values", "content", "position")}


def attend_slots(x, module, name, slots, heads):
    """Attention of one learned query per slot and head: weights [K][h][T]."""
    scores = np.array([linear(frame, module, f"{name}.score") for frame in x])
    return [[softmax(scores[:, k * heads + h]) for h in range(heads)] for k in range(slots)]


def pooled(weight, x, heads):
    """Head h pools its share of the channels: [K, D]."""
    d = x.shape[1] // heads
    return np.array([np.concatenate([w[h] @ x[:, h * d : h * d + d] for h in range(heads)]) for w in weight])


def local_reference(expert, given, modalities, b, slots, pooling="max"):
    out = {}
    for m in modalities:
        mask, x = given[m].mask_BT[b].numpy(), given[m].content_BTD[b].numpy()
        if not mask.any():
            continue
        part, found = expert.streams[m], []
        for t in range(len(x)):
            scales = []
            for i, kernel in enumerate(c.kernel_size[0] for c in part.depthwise):
                taps, total = weights(part, f"depthwise.{i}.weight")[:, 0], np.zeros(x.shape[1])
                for j in range(kernel):
                    at = t + j - kernel // 2
                    if 0 <= at < len(x) and mask[at]:
                        total = total + taps[:, j] * x[at]
                scales.append(total)
            found.append(linear(gelu(linear(np.concatenate(scales), part, "pointwise")), part, "detect"))
        found = np.array(found)[mask]
        scaled = [found * weights(part, "slot_KD")[k] for k in range(slots)]
        if pooling == "max":
            peaks = [s.max(0) for s in scaled]
        else:
            peaks = [np.log(np.exp(SHARPNESS * s).mean(0)) / SHARPNESS for s in scaled]
        out[m] = [norm(linear(gelu(peak), part, "out"), expert.answer, "norm") for peak in peaks]
    return out


def semantic_reference(expert, given, modalities, b, slots, heads):
    present = [m for m in modalities if given[m].mask_BT[b].any()]
    out = {}
    for m in present if len(present) > 1 else []:
        mine, ask = valid_frames(given[m], b), expert.ask[m]
        weight = attend_slots(mine["content"], ask, "attention", slots, heads)
        total = np.zeros((slots, mine["content"].shape[1]))
        d = mine["content"].shape[1] // heads
        for k, row in enumerate(pooled(weight, mine["content"], heads)):
            query = norm(row, ask, "norm") @ weights(ask, "content.weight_KDD")[k] + weights(ask, "content.bias_KD")[k]
            for o in present:
                if o == m:
                    continue
                other_result = valid_frames(given[o], b)
                kv = np.array([linear(frame, expert.source[o], "") for frame in other_result["content"]])
                for h in range(heads):
                    part = slice(h * d, h * d + d)
                    score = kv[:, part] @ query[part] / math.sqrt(d)
                    if "text" not in (m, o):
                        near = weights(ask, "near_hKn")[h, k]
                        when = weight[k][h] @ mine["position"] * np.concatenate([near, near])
                        score = score + other_result["position"] @ when
                    total[k, part] += softmax(score) @ kv[:, len(query) :][:, part]
        out[m] = [norm(linear(row, expert.out[m], ""), expert.answer, "norm") for row in total]
    return out


def global_reference(expert, given, modalities, b, slots, heads):
    joined, owner = [], []
    for m in modalities:
        mask, x = given[m].mask_BT[b].numpy(), given[m].values_BTD[b].numpy()
        for start in range(0, len(x), expert.stride):
            inside = x[start : start + expert.stride][mask[start : start + expert.stride]]
            if len(inside):
                joined.append(inside.mean(0) + weights(expert.tag[m], "vector_D"))
                owner.append(m)
    joined = np.array(joined)
    for block in expert.blocks:
        normed = [norm(x, block, "attention_norm") for x in joined]
        q, k, v = (np.array(part) for part in zip(*(np.split(linear(x, block, "qkv"), 3) for x in normed), strict=True))
        d, heard = q.shape[1] // heads, np.zeros_like(q)
        for h in range(heads):
            part = slice(h * d, h * d + d)
            for i in range(len(q)):
                heard[i, part] = softmax(k[:, part] @ q[i, part] / math.sqrt(d)) @ v[:, part]
        joined = joined + np.array([linear(x, block, "out") for x in heard])
        joined = joined + np.array(
            [linear(gelu(linear(norm(x, block, "norm"), block, "up")), block, "down") for x in joined]
        )
    joined, out = np.array([norm(x, expert, "norm") for x in joined]), {}
    for m in dict.fromkeys(owner):
        mine = joined[[i for i, o in enumerate(owner) if o == m]]
        weight = attend_slots(mine, expert.read[m], "attention", slots, heads)
        out[m] = [
            norm(linear(row, expert.read[m], "out"), expert.answer, "norm") for row in pooled(weight, mine, heads)
        ]
    return out


def answer(expert, given):
    """What the gate reads of an expert's answer, [B, K, M, D], and validity."""
    values, valid_BM = expert(given)
    return torch.stack(values, 2).masked_fill(~valid_BM[:, None, :, None], 0.0), valid_BM


def compare(expert, given, modalities, reference):
    values_BKMD, valid_BM = answer(expert, given)
    assert values_BKMD.shape == (len(LENGTHS), 3, len(modalities), 8)
    for b in range(len(LENGTHS)):
        expected = reference(b) if any(given[m].mask_BT[b].any() for m in modalities) else {}
        for i, m in enumerate(modalities):
            assert bool(valid_BM[b, i]) == (m in expected)
            target = np.array(expected[m]) if m in expected else np.zeros((3, 8))
            np.testing.assert_allclose(values_BKMD[b, :, i].detach().numpy(), target, atol=1e-10)


def with_holes(given):
    """The streams with a frame in the middle masked, as repaired frames are."""
    out = {}
    for m, s in given.items():
        mask = s.mask_BT.clone()
        mask[:, 1] = False
        hide = ~mask[..., None]
        out[m] = EncodedModality(
            s.values_BTD.masked_fill(hide, 0),
            mask,
            s.content_BTD.masked_fill(hide, 0),
            s.position_BTD.masked_fill(hide, 0),
        )
    return out


@pytest.mark.parametrize("pooling", ["max", "logsumexp"])
@pytest.mark.parametrize("modalities", [ALL, ("audio",)])
def test_local_equals_loops(pooling, modalities):
    expert = build(LocalExpert, modalities, local_pooling=pooling)
    given = with_holes(streams(LENGTHS, modalities=modalities))
    compare(expert, given, modalities, lambda b: local_reference(expert, given, modalities, b, 3, pooling))


@pytest.mark.parametrize("modalities", [ALL, ("audio", "video"), ("text", "audio")])
def test_semantic_equals_loops(modalities):
    expert = build(SemanticExpert, modalities)
    given = with_holes(streams(LENGTHS, modalities=modalities))
    compare(expert, given, modalities, lambda b: semantic_reference(expert, given, modalities, b, 3, 2))


@pytest.mark.parametrize("stride", [1, 4])
def test_global_equals_loops(stride):
    expert = build(GlobalExpert, global_stride=stride, global_layers=2)
    given = with_holes(streams(LENGTHS))
    compare(expert, given, ALL, lambda b: global_reference(expert, given, ALL, b, 3, 2))


@pytest.mark.parametrize("kind", EXPERTS)
def test_validity(kind):
    _, valid_BM = answer(build(kind), streams(LENGTHS))
    expected = PRESENT & (PRESENT.sum(1, keepdims=True) > 1) if kind is SemanticExpert else PRESENT
    np.testing.assert_array_equal(valid_BM.numpy(), expected)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("pooling", ["max", "logsumexp"])
def test_nothing_present_is_zero_with_finite_gradients(kind, pooling):
    expert = build(kind, local_pooling=pooling)
    given = {
        m: EncodedModality(*(t.requires_grad_() if t.is_floating_point() else t for t in s))
        for m, s in streams([[0] * 3]).items()
    }
    values_BKMD, valid_BM = answer(expert, given)
    assert not valid_BM.any()
    assert not values_BKMD.any()
    values_BKMD.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in expert.parameters())
    assert all(t.grad is None or not t.grad.any() for s in given.values() for t in s if t.is_floating_point())


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_missing_modality_is_exactly_ignored(kind):
    """The others' answers do not depend on how long the missing one's padding is, and equal an expert never given it."""
    expert = build(kind)
    given = streams([[6, 11, 0], [2, 5, 0]])
    values, _ = answer(expert, given)
    given["video"] = stream(lengths_mask([0, 0], 40))
    longer, _ = answer(expert, given)
    torch.testing.assert_close(values[:, :, :2], longer[:, :, :2], rtol=0, atol=1e-12)
    assert not longer[:, :, 2].any()


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("pooling", ["max", "logsumexp"])
def test_right_padding_changes_nothing(kind, pooling):
    expert = build(kind, local_pooling=pooling)
    values, valid = answer(expert, streams(LENGTHS))

    def padded(s):
        return EncodedModality(*(torch.nn.functional.pad(t, (0, 9) if t.ndim == 2 else (0, 0, 0, 9)) for t in s))

    wider, still = answer(expert, {m: padded(s) for m, s in streams(LENGTHS).items()})
    assert torch.equal(valid, still)
    torch.testing.assert_close(values, wider, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", EXPERTS)
def test_gradients(kind):
    expert = build(kind, ("audio", "video"), width=4, pseudo_tokens=1, local_kernels=[3])
    names = [name for name, _ in expert.named_parameters()]
    given = streams([[0, 3, 0], [0, 4, 3]], T=(1, 4, 3), D=4, modalities=("audio", "video"))
    parameters = [p.detach().clone().requires_grad_() for p in expert.parameters()]

    def run(*tensors):
        return torch.func.functional_call(expert, dict(zip(names, tensors, strict=True)), (given,))[0]

    assert torch.autograd.gradcheck(run, parameters, fast_mode=True)


def test_semantic_answers_hold_nothing_of_the_asker_but_the_question():
    """With one frame to hear, every question gets the same answer: what is asked cannot leak into it."""
    expert = build(SemanticExpert, ("audio", "video"))
    for seed in (1, 2):
        given = {"audio": stream(lengths_mask([5], 5), seed=seed), "video": stream(lengths_mask([1], 1), seed=9)}
        heard = answer(expert, given)[0][:, :, 0]
        if seed == 1:
            first = heard
    torch.testing.assert_close(first, heard, rtol=0, atol=1e-12)
    torch.testing.assert_close(heard[:, 0], heard[:, 1], rtol=0, atol=1e-12)


def test_semantic_moments_are_relative():
    """Both clocks moved by the same time: nothing changes. One clock moved: the answers do."""
    expert = build(SemanticExpert, ("audio", "video"))
    mask = lengths_mask([6, 4], 6)

    def given(shift_audio, shift_video):
        out = {}
        for seed, (m, shift) in enumerate((("audio", shift_audio), ("video", shift_video))):
            s = stream(mask, seed=seed)
            from_zero = torch.arange(6).expand(2, 6) / 10.0
            position = sinusoidal_positions(from_zero + shift, 8).double().masked_fill(~mask[..., None], 0)
            out[m] = EncodedModality(s.content_BTD + position, mask, s.content_BTD, position)
        return out

    base, _ = answer(expert, given(0.0, 0.0))
    together, _ = answer(expert, given(0.7, 0.7))
    apart, _ = answer(expert, given(0.7, 0.0))
    torch.testing.assert_close(base, together, rtol=0, atol=1e-5)  # positions are float32
    assert (base - apart).abs().max() > 1e-3


def test_semantic_prefers_the_same_moment_before_training():
    torch.manual_seed(0)
    ask = SemanticExpert(config(width=64, heads=2), ("audio", "video")).ask["audio"]
    position = stream(lengths_mask([40], 40), D=64).position_BTD.float()
    score = (position[0, 20] * torch.cat([ask.near_hKn, ask.near_hKn], -1)[0, 0]) @ position[0].T
    assert score.argmax() == 20
    assert score.max().item() == pytest.approx(NEARNESS, rel=1e-4)


def test_semantic_needs_two_modalities():
    with pytest.raises(ValueError, match="SemanticExpert needs at least 2 modalities, not 1"):
        SemanticExpert(config(), ("audio",))


def test_peaks_survive_where_means_drown():
    values, mask = torch.zeros(1, 96, 1), torch.ones(1, 96, dtype=torch.bool)
    values[0, 40:44] = 5.0
    one = torch.ones(1, 1)
    assert masked_scaled_max(values, mask, one).item() == 5.0
    assert masked_scaled_logsumexp(values, mask, one, SHARPNESS).item() > 4.0
    assert masked_mean(values, mask).item() < 0.3
    assert masked_scaled_max(-values, mask, -one).item() == 5.0  # a negative scale reads troughs


def test_logsumexp_lies_between_mean_and_maximum():
    values, mask = torch.randn(3, 9, 4, dtype=torch.float64), lengths_mask([9, 4, 1], 9)
    one = torch.ones(1, 4, dtype=torch.float64)
    mean, peak = masked_mean(values, mask), masked_scaled_max(values, mask, one)[:, 0]
    smooth = masked_scaled_logsumexp(values, mask, one, SHARPNESS)[:, 0]
    assert (smooth >= mean - 1e-12).all()
    assert (smooth <= peak + 1e-12).all()


def test_window_means_count_valid_frames_only():
    mask = torch.tensor([[True, False, True, True, False, False, False]])
    values = torch.tensor([[1.0, 50.0, 3.0, 5.0, 50.0, 50.0, 50.0]])[..., None]
    means, valid = masked_window_mean(values, mask, 2)
    assert means[0, :, 0].tolist() == [1.0, 4.0, 0.0, 0.0]
    assert valid[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("biased", [False, True])
def test_attention_to_nothing_is_zero_with_finite_gradients(biased):
    q, k, v = (torch.randn(2, n, 8, requires_grad=True) for n in (3, 5, 5))
    bias = torch.randn(2, 2, 3, 5, requires_grad=True) if biased else None
    mask, source = lengths_mask([4, 0], 5), FoldedCrossAttention(8, 2)
    for out, given in ((masked_attention(q, k, v, mask, 2), (q, k, v)), (source(q, k, mask, bias), (q, k, bias))):
        assert not out[1].any()
        assert out[0].any()
        gradients = torch.autograd.grad(out.square().sum(), [t for t in given if t is not None])
        for gradient in gradients:
            assert torch.isfinite(gradient).all()
            assert not gradient[1].any()


def test_a_source_is_attention_to_its_keys_and_values():
    """Folding the layer into queries and sums is the attention that makes its keys and values first."""
    torch.manual_seed(0)
    source, mask = FoldedCrossAttention(8, 2).double(), lengths_mask([4, 5, 1], 5)
    query, frames = (torch.randn(3, n, 8, dtype=torch.float64) for n in (3, 5))
    key, value = torch.nn.functional.linear(frames, source.weight, source.bias).chunk(2, -1)
    for b in range(3):
        n, heads = int(mask[b].sum()), []
        for h in range(2):
            at = slice(4 * h, 4 * h + 4)
            score = query[b, :, at] @ key[b, :n, at].T / 2.0
            heads.append(score.softmax(-1) @ value[b, :n, at])
        torch.testing.assert_close(source(query, frames, mask, None)[b], torch.cat(heads, -1), rtol=0, atol=1e-12)


def test_slot_attention_sums_to_one_over_the_valid():
    attention = SlotAttention(8, 3, 2)
    mask = lengths_mask([4, 0], 5)
    weight = attention(torch.randn(2, 5, 8), mask)
    assert weight.shape == (2, 2, 3, 5)
    torch.testing.assert_close(weight[0].sum(-1), torch.ones(2, 3))
    assert not weight[0, ..., 4:].any()
    assert not weight[1].any()
    assert not pool(weight, torch.randn(2, 5, 8))[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EXPERTS)
def test_half_precision_is_near_float32(kind, dtype):
    torch.manual_seed(0)
    expert = kind(config(), ALL)
    reference, _ = answer(expert, streams(LENGTHS, dtype=torch.float32))
    half, _ = answer(expert.to(dtype), streams(LENGTHS, dtype=dtype))
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.float(), reference, rtol=0, atol=0.15 if dtype == torch.bfloat16 else 0.02)


class Constant(Expert):
    """As many ones as `vectors` says, whatever it is shown."""

    least_modalities = 3
    vectors = 3

    def build(self, config, modalities):
        self.width = config.width

    def values(self, streams):
        rows = len(next(iter(streams.values())).mask_BT)
        return [torch.ones(rows, self.slots, self.width, dtype=torch.float64) for _ in range(self.vectors)]


def test_an_expert_counts_where_a_sample_has_as_many_modalities_as_it_needs():
    expert = build(Constant)
    _, valid_BM = expert(streams(LENGTHS))
    np.testing.assert_array_equal(valid_BM.numpy(), PRESENT & (PRESENT.sum(1, keepdims=True) == 3))
    with pytest.raises(ValueError, match="Constant needs at least 3 modalities, not 2"):
        Constant(config(), ALL[:2])


def test_an_expert_that_gives_other_vectors_is_refused_by_name(monkeypatch):
    expert = build(Constant)
    monkeypatch.setattr(Constant, "vectors", 2)
    with pytest.raises(
        ValueError, match=r"Constant must give 3 tensors \[B, 3, D\], one per modality, not: \[5, 3, 8\]"
    ):
        expert(streams(LENGTHS))
