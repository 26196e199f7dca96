"""Packed rows against the model's own forward, one sample at a time; every attention that runs on a CPU."""

from __future__ import annotations

import sys
import types
from functools import cache

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.models.tiny_models import FAMILIES, load, make_trie, save_family
from trainer.batch import Packing
from trainer.models.backbone import packed
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.loading import BackboneError
from trainer.models.backbone.packed import PackedRow

BACKENDS = ("sdpa", "eager", "blocks", "varlen")
LENGTHS = (4, 1, 7, 5)
ANSWERS = [[5], [5, 6], [7, 8, 9], [7, 8, 10], [11]]
WINDOWS = [
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ("gemma2", {"attn_logit_softcapping": 5.0, "sliding_window": 8}),
]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Loaded once each; the ways that share a model are switched by name."""

    @cache
    def folder(family):
        return save_family(family, tmp_path_factory.mktemp("models") / family)

    @cache
    def loaded(family, dtype, quantization, eager):
        attention = "eager" if eager else "blocks"
        return load(folder(family), dtype, quantization=quantization, attention=attention)

    def get(backend="blocks", family="qwen3", dtype=torch.float32, quantization="none"):
        backbone = loaded(family, dtype, quantization, backend == "eager")
        backbone.attention = backend
        backbone.zero_grad()
        return backbone.eval()

    get.folder = folder
    return get


def make_packing(prefix=5, lengths=LENGTHS, trie=None) -> Packing:
    return Packing(prefix, torch.tensor(lengths), sum(lengths), max(lengths), trie)


def make_embeds(backbone: Backbone, packing: Packing, seed=0) -> torch.Tensor:
    ids = torch.randint(2, 320, (packing.prefix + packing.total,), generator=torch.Generator().manual_seed(seed))
    return backbone.embed(ids).detach()


def spans(packing: Packing) -> list[slice]:
    """Where each sample stands in a row that holds its prefix."""
    stop = packing.prefix + packing.length_B.cumsum(0)
    return [slice(int(b - n), int(b)) for b, n in zip(stop, packing.length_B, strict=True)]


def one_by_one(backbone: Backbone, embeds: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The row's hidden states from a plain causal forward of prefix and sample, for each sample."""
    prefix, parts = embeds[: packing.prefix], []
    for span in spans(packing):
        row = torch.cat([prefix, embeds[span]])[None]
        hidden = backbone.base.get_decoder()(inputs_embeds=row, use_cache=False).last_hidden_state[0]
        parts.append(hidden if not parts else hidden[packing.prefix :])
    return torch.cat(parts)


def loss_of(backbone: Backbone, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    last = torch.stack([hidden[span.stop - 1] for span in spans(packing)])
    return cross_entropy(backbone.logits(last), torch.arange(len(last)) + 20, reduction="sum")


def lora_gradients(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.requires_grad}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_hidden_states_equal_separate_passes(backbones, backend, family, dtype, quantization):
    backbone = backbones(backend, family, dtype, quantization)
    packing = make_packing()
    embeds = make_embeds(backbone, packing)
    got, want = backbone.packed(embeds, packing), one_by_one(backbone, embeds, packing)
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    else:
        assert relative(got.float(), want.float()) < 2e-2
        exact = backbone.packed(embeds, packing, fp32_attention=True)
        assert relative(exact.float(), want.float()) < 2e-2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_and_every_gradient_equal_separate_passes(backbones, backend, quantization):
    backbone = backbones(backend, quantization=quantization)
    packing = make_packing()
    embeds = make_embeds(backbone, packing).requires_grad_()
    want = loss_of(backbone, one_by_one(backbone, embeds, packing), packing)
    want.backward()
    wanted, wanted_input = lora_gradients(backbone), embeds.grad.clone()
    backbone.zero_grad()
    embeds.grad = None
    got = loss_of(backbone, backbone.packed(embeds, packing), packing)
    got.backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for name, grad in lora_gradients(backbone).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(embeds.grad, wanted_input, atol=1e-5, rtol=1e-5)
    assert min(float(grad.abs().max()) for grad in wanted.values()) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_recomputes_the_same(backbones, backend, reentrant):
    plain, packing = backbones(backend), make_packing()
    embeds = make_embeds(plain, packing)
    loss_of(plain, plain.packed(embeds, packing), packing).backward()
    wanted = lora_gradients(plain)
    saving = load(
        backbones.folder("qwen3"), attention=backend, gradient_checkpointing=True, reentrant=reentrant
    ).train()
    loss_of(saving, saving.packed(embeds.clone().requires_grad_(), packing), packing).backward()
    for name, grad in lora_gradients(saving).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_goes_from_one_sample_to_another(backbones, backend):
    backbone, packing = backbones(backend), make_packing()
    embeds = make_embeds(backbone, packing).requires_grad_()
    where = spans(packing)
    backbone.packed(embeds, packing)[where[2]].square().sum().backward()
    for sample in (0, 1, 3):
        assert embeds.grad[where[sample]].abs().max() == 0
    assert embeds.grad[where[2]].abs().min(1).values.max() > 0
    assert embeds.grad[: packing.prefix].abs().max() > 0


@pytest.mark.parametrize(
    ("prefix", "lengths"), [(0, LENGTHS), (3, (1,)), (0, (1, 1)), (1, (6,)), (4, (2, 2, 2))], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_odd_shapes(backbones, backend, prefix, lengths):
    backbone, packing = backbones(backend), make_packing(prefix, lengths)
    embeds = make_embeds(backbone, packing)
    got = backbone.packed(embeds, packing)
    torch.testing.assert_close(got, one_by_one(backbone, embeds, packing), atol=1e-5, rtol=1e-5)
    cache = backbone.prefix(embeds[:prefix])
    behind = backbone.packed(embeds[prefix:], packing, cache)
    torch.testing.assert_close(behind, got[prefix:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_cached_prefix_is_the_prefix_and_stays_as_it_is(backbones, backend, family):
    backbone, packing = backbones(backend, family), make_packing()
    embeds = make_embeds(backbone, packing)
    cache = backbone.prefix(embeds[:5])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for seed in (1, 2):  # twice: nothing is stored behind the prefix
        other = torch.cat([embeds[:5], make_embeds(backbone, packing, seed)[5:]])
        got = backbone.packed(other[5:], packing, cache)
        torch.testing.assert_close(got, backbone.packed(other, packing)[5:], atol=1e-5, rtol=1e-5)
    for (keys, values), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "glm4"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_nodes_of_a_trie_see_their_context_and_ancestors(backbones, backend, family, cached):
    backbone, trie = backbones(backend, family), make_trie(ANSWERS)
    nodes, contexts = len(trie.token_N), (6, 3, 9)
    packing = make_packing(4, [n + nodes for n in contexts], trie)
    embeds = make_embeds(backbone, packing)
    for span in spans(packing):
        embeds[span.stop - nodes : span.stop] = backbone.embed(trie.token_N)
    if cached:
        got = backbone.packed(embeds[4:], packing, backbone.prefix(embeds[:4]))
        got = torch.cat([got[:0].new_zeros(4, got.shape[1]), got])
    else:
        got = backbone.packed(embeds, packing)
    for span, context in zip(spans(packing), contexts, strict=True):
        for node in range(nodes):
            path = trie.ancestors_NN[node].nonzero()[:, 0]
            row = torch.cat([embeds[:4], embeds[span][:context], backbone.embed(trie.token_N[path])])[None]
            want = backbone.base.get_decoder()(inputs_embeds=row, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(got[span][context + node], want[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[span][:context], want[4 : 4 + context], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@torch.no_grad()
def test_exact_values_in_half_precision_do_not_hang_on_neighbours(backbones, backend):
    backbone = backbones(backend, dtype=torch.bfloat16)
    packing = make_packing()
    embeds = make_embeds(backbone, packing)
    got = backbone.packed(embeds, packing, fp32_attention=True)
    for span in spans(packing):
        alone = make_packing(5, (span.stop - span.start,))
        want = backbone.packed(torch.cat([embeds[:5], embeds[span]]), alone, fp32_attention=True)[5:]
        torch.testing.assert_close(got[span], want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("asked", ["auto", "sdpa", "eager", "blocks", "varlen"])
@pytest.mark.parametrize(("family", "sizes"), WINDOWS, ids=[family for family, _ in WINDOWS])
@torch.no_grad()
def test_sliding_windows_are_right_or_refused(tmp_path, family, sizes, asked):
    folder = save_family(family, tmp_path / "m", **sizes)
    if family == "gemma2" and asked not in ("auto", "eager"):  # its soft-capped scores are eager's alone
        with pytest.raises(BackboneError, match=r"cap their attention.s scores softly"):
            load(folder, attention=asked)
        return
    backbone = load(folder, attention=asked).eval()
    packing = make_packing(6, (9, 2, 12))
    embeds = make_embeds(backbone, packing)
    got = backbone.packed(embeds, packing)
    torch.testing.assert_close(got, one_by_one(backbone, embeds, packing), atol=1e-5, rtol=1e-5)
    behind = backbone.packed(embeds[6:], packing, backbone.prefix(embeds[:6]))
    torch.testing.assert_close(behind, got[6:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_does_not_fit_is_refused(backbones):
    backbone, packing = backbones(), make_packing()
    embeds = make_embeds(backbone, packing)
    with pytest.raises(ValueError, match="the row has 21 tokens, its packing names 22"):
        backbone.packed(embeds[1:], packing)
    with pytest.raises(ValueError, match="holds a prefix of 3 tokens, the packing names 5"):
        backbone.packed(embeds[5:], packing, backbone.prefix(embeds[:3]))
    saving = load(backbones.folder("qwen3"), gradient_checkpointing=True).train()
    with pytest.raises(ValueError, match="takes no cache"):
        saving.prefix(embeds[:5])


# The kernels alone, in float64


def random_heads(packing, cached=False):
    """Queries, keys and values of six heads on two."""
    torch.manual_seed(11)
    keys = packing.prefix + packing.total
    rows = packing.total if cached else keys
    return [torch.randn(1, heads, n, 8, dtype=torch.float64) for heads, n in ((6, rows), (2, keys), (2, keys))]


def by_mask(row, query, key, value):
    key, value = (t.repeat_interleave(3, 1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * 0.3
    return (scores.masked_fill(~row.mask_RK, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("prefix", "lengths"), [(5, LENGTHS), (0, LENGTHS), (7, (1,)), (2, (3, 1, 1))], ids=str)
@pytest.mark.parametrize("backend", ["blocks", "varlen"])
def test_a_kernel_equals_the_mask_to_the_last_digits(backend, prefix, lengths, cached):
    packing = make_packing(prefix, lengths)
    row = PackedRow(packing, cached)
    query, key, value = random_heads(packing, cached)
    got = row.kernel(backend)(query, key, value, scale=0.3, dropout=0.0)
    torch.testing.assert_close(got, by_mask(row, query, key, value), atol=1e-15, rtol=1e-15)


def test_the_mask_is_what_a_loop_over_pairs_says():
    trie = make_trie(ANSWERS)
    nodes = len(trie.token_N)
    packing = make_packing(3, (nodes + 2, nodes + 4), trie)
    for cached in (False, True):
        row = PackedRow(packing, cached)
        # (sample, offset) of every key; the prefix is sample -1
        keys = [(-1, i) for i in range(3)] + [(0, i) for i in range(nodes + 2)] + [(1, i) for i in range(nodes + 4)]
        for q, (sample, at) in enumerate(keys[3:] if cached else keys):
            for k, (other, offset) in enumerate(keys):
                context = (2, 4)[sample]
                if sample == -1:
                    sees = other == -1 and offset <= at
                elif other != sample:
                    sees = other == -1
                elif at >= context and offset >= context:
                    sees = bool(trie.ancestors_NN[at - context, offset - context])
                else:
                    sees = offset <= at
                assert bool(row.mask_RK[q, k]) == sees, (q, k)


@pytest.mark.parametrize("cached", [False, True])
def test_the_rule_given_to_flex_is_the_mask(cached):
    packing = make_packing(6, (40, 1, 90, 30))
    row = PackedRow(packing, cached)
    queries, keys = row.mask_RK.shape
    at, key = torch.arange(queries)[:, None], torch.arange(keys)[None]
    assert torch.equal(row._flex_mask.mask_mod(0, 0, at, key), row.mask_RK)
    assert row._flex_mask.shape[-2:] == (256, 256)  # whole blocks


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_flex_attends_by_its_rule(monkeypatch):
    """Compiled it needs a GPU; its plain form computes the same."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("trainer.models.backbone.packed._compiled_flex", lambda: flex_attention)
    packing = make_packing(6, (40, 1, 90, 30))
    query, key, value = random_heads(packing)
    row = PackedRow(packing)
    got = row.flex(query, key, value, scale=0.3, dropout=0.0)
    torch.testing.assert_close(got, by_mask(row, query, key, value), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="attention=flex has no dropout"):
        row.flex(query, key, value, scale=0.3, dropout=0.1)


@pytest.mark.parametrize("cached", [False, True])
def test_flash_gets_the_sequences_it_takes(monkeypatch, cached):
    """flash-attn cannot run here: a loop in float64 with its arguments and its alignment, bottom right, stands for it."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        *,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
        assert causal
        assert not deterministic
        out = torch.empty_like(q)
        for i in range(len(cu_seqlens_q) - 1):
            for at in range(cu_seqlens_q[i], cu_seqlens_q[i + 1]):
                stop = cu_seqlens_k[i + 1] - (cu_seqlens_q[i + 1] - 1 - at)
                for head in range(6):
                    seen = slice(cu_seqlens_k[i], stop), head // 3
                    out[at, head] = (k[seen] @ q[at, head] * softmax_scale).softmax(0) @ v[seen]
        return out

    standing = types.ModuleType("flash_attn")
    standing.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", standing)
    packing = make_packing()
    query, key, value = random_heads(packing, cached)
    row = PackedRow(packing, cached)
    got = row.kernel("flash_attention_2")(query, key, value, scale=0.3, dropout=0.0)
    torch.testing.assert_close(got, by_mask(row, query, key, value), atol=1e-15, rtol=1e-15)


@torch.no_grad()
def test_what_takes_no_tree_leaves_scoring_to_blocks_and_says_it_once(backbones, caplog):
    caplog.set_level("INFO")
    backbone, trie = load(backbones.folder("qwen3"), attention="varlen").eval(), make_trie(ANSWERS)
    packing = make_packing(4, [12, 15], trie)
    embeds = make_embeds(backbone, packing)
    got = [backbone.packed(embeds, packing, fp32_attention=True) for _ in range(2)]
    backbone.attention = "blocks"
    assert torch.equal(got[0], backbone.packed(embeds, packing, fp32_attention=True))
    assert caplog.text.count("varlen takes no answer trie: scoring uses blocks") == 1


# The choice at load time


def test_auto_takes_blocks_and_says_so(backbones, caplog):
    caplog.set_level("INFO")
    assert load(backbones.folder("qwen3")).attention == "blocks"
    assert "attention: blocks (auto)" in caplog.text


def test_a_family_that_drops_the_kernel_attends_by_the_mask(backbones, monkeypatch, caplog):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    own = Qwen3DecoderLayer.forward

    def dropping(self, hidden_states, kernel=None, fp32_attention=False, **options):
        return own(self, hidden_states, **options)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", dropping)
    caplog.set_level("INFO")
    assert load(backbones.folder("qwen3")).attention == "sdpa"
    assert "attention: sdpa (auto, without blocks: " in caplog.text
    with pytest.raises(BackboneError, match=r"packed rows cannot be attended to: blocks: .*attention=auto, or sdpa"):
        load(backbones.folder("qwen3"), attention="blocks")


def test_a_kernel_with_wrong_gradients_is_refused(tmp_path, monkeypatch):
    """Its values are right, so that no forward pass shows it."""
    own = packed.varlen_loop

    def wrong(query, key, value, *arguments, **options):
        return own(query, key, value.detach(), *arguments, **options)

    monkeypatch.setattr(packed, "varlen_loop", wrong)
    folder = save_family("qwen3", tmp_path / "m")
    with pytest.raises(BackboneError, match="varlen: its gradients differ from those under a mask by"):
        load(folder, attention="varlen")
    monkeypatch.setattr(packed, "varlen_loop", own)
    assert load(folder, attention="varlen").attention == "varlen"


def test_flex_attention_may_be_compiled_for_many_shapes():
    from torch._dynamo import config

    packed._compiled_flex()
    assert config.recompile_limit >= packed.FLEX_SHAPES


@pytest.mark.parametrize("fault", ["leak", "no prefix"])
def test_a_kernel_that_is_wrong_is_refused(backbones, monkeypatch, fault):
    own = PackedRow.blocks

    def wrong(self, query, key, value, **options):
        if fault == "no prefix":
            return own(self, query, key, value * (torch.arange(value.shape[2]) >= 2)[:, None], **options)
        return own(self, query, key, value + 1e-6 * value.mean(2, keepdim=True), **options)

    monkeypatch.setattr(PackedRow, "blocks", wrong)
    expected = "samples see each other" if fault == "leak" else "differ from the model's own"
    with pytest.raises(BackboneError, match=f"blocks: .*{expected}"):
        load(backbones.folder("qwen3"), attention="blocks")


@pytest.mark.parametrize(("asked", "reason"), [("flex", "CUDA device"), ("flash_attention_2", "CUDA device")])
def test_what_cannot_run_here_is_refused(backbones, asked, reason):
    with pytest.raises(BackboneError, match=f"attention={asked} cannot run: .*{reason}.*Use auto"):
        load(backbones.folder("qwen3"), attention=asked)


def test_a_model_with_attention_dropout_is_refused_where_there_is_none(tmp_path):
    folder = save_family("qwen3", tmp_path / "m", attention_dropout=0.1)
    assert load(folder).attention == "blocks"
    with pytest.raises(BackboneError, match=r"varlen has no dropout, and the model drops 0\.1"):
        load(folder, attention="varlen")
