"""Packed rows against the model's own forward, one sample at a time; every attention that runs on a CPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny_models import FAMILIES, load, make_trie, save_family
from torch.nn.functional import cross_entropy

from trainer.batch import Packing
from trainer.models.backbone import Backbone
from trainer.models.loading import BackboneError
from trainer.models.packed import PackedRow

WAYS = ("sdpa", "eager", "blocks")
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

    def get(way="blocks", family="qwen3", dtype=torch.float32, quantization="none"):
        backbone = loaded(family, dtype, quantization, way == "eager")
        backbone.attention = way
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
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_hidden_states_equal_separate_passes(backbones, way, family, dtype, quantization):
    backbone = backbones(way, family, dtype, quantization)
    packing = make_packing()
    embeds = make_embeds(backbone, packing)
    got, want = backbone.packed(embeds, packing), one_by_one(backbone, embeds, packing)
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    else:
        assert relative(got.float(), want.float()) < 2e-2
        exact = backbone.packed(embeds, packing, exact=True)
        assert relative(exact.float(), want.float()) < 2e-2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_the_loss_and_every_gradient_equal_separate_passes(backbones, way, quantization):
    backbone = backbones(way, quantization=quantization)
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
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_recomputes_the_same(backbones, way, reentrant):
    plain, packing = backbones(way), make_packing()
    embeds = make_embeds(plain, packing)
    loss_of(plain, plain.packed(embeds, packing), packing).backward()
    wanted = lora_gradients(plain)
    saving = load(backbones.folder("qwen3"), attention=way, gradient_checkpointing=True, reentrant=reentrant).train()
    loss_of(saving, saving.packed(embeds.clone().requires_grad_(), packing), packing).backward()
    for name, grad in lora_gradients(saving).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_goes_from_one_sample_to_another(backbones, way):
    backbone, packing = backbones(way), make_packing()
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
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_odd_shapes(backbones, way, prefix, lengths):
    backbone, packing = backbones(way), make_packing(prefix, lengths)
    embeds = make_embeds(backbone, packing)
    got = backbone.packed(embeds, packing)
    torch.testing.assert_close(got, one_by_one(backbone, embeds, packing), atol=1e-5, rtol=1e-5)
    cache = backbone.prefix(embeds[:prefix])
    behind = backbone.packed(embeds[prefix:], packing, cache)
    torch.testing.assert_close(behind, got[prefix:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_cached_prefix_is_the_prefix_and_stays_as_it_is(backbones, way, family):
    backbone, packing = backbones(way, family), make_packing()
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
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_nodes_of_a_trie_see_their_context_and_ancestors(backbones, way, family, cached):
    backbone, trie = backbones(way, family), make_trie(ANSWERS)
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


@pytest.mark.parametrize("way", ["sdpa", "blocks"])
@torch.no_grad()
def test_exact_values_in_half_precision_do_not_hang_on_neighbours(backbones, way):
    backbone = backbones(way, dtype=torch.bfloat16)
    packing = make_packing()
    embeds = make_embeds(backbone, packing)
    got = backbone.packed(embeds, packing, exact=True)
    for span in spans(packing):
        alone = make_packing(5, (span.stop - span.start,))
        want = backbone.packed(torch.cat([embeds[:5], embeds[span]]), alone, exact=True)[5:]
        torch.testing.assert_close(got[span], want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("asked", ["auto", "sdpa", "eager", "blocks"])
@pytest.mark.parametrize(("family", "sizes"), WINDOWS, ids=[family for family, _ in WINDOWS])
@torch.no_grad()
def test_sliding_windows_are_right_or_refused(tmp_path, family, sizes, asked):
    folder = save_family(family, tmp_path / "m", **sizes)
    if family == "gemma2" and asked in ("sdpa", "blocks"):  # its soft-capped scores are eager's alone
        with pytest.raises(BackboneError, match="cannot attend with"):
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
def test_what_does_not_fit_is_said(backbones):
    backbone, packing = backbones(), make_packing()
    embeds = make_embeds(backbone, packing)
    with pytest.raises(ValueError, match="the row has 21 tokens, its packing names 22"):
        backbone.packed(embeds[1:], packing)
    with pytest.raises(ValueError, match="holds a prefix of 3 tokens, the packing names 5"):
        backbone.packed(embeds[5:], packing, backbone.prefix(embeds[:3]))
    saving = load(backbones.folder("qwen3"), gradient_checkpointing=True).train()
    with pytest.raises(ValueError, match="takes no cache"):
        saving.prefix(embeds[:5])


# The choice at load time


def test_auto_takes_blocks_and_says_so(backbones, caplog):
    caplog.set_level("INFO")
    assert load(backbones.folder("qwen3")).attention == "blocks"
    assert "attention: blocks (auto)" in caplog.text


def test_a_family_that_drops_the_kernel_attends_by_the_mask(backbones, monkeypatch, caplog):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    own = Qwen3DecoderLayer.forward

    def dropping(self, hidden_states, kernel=None, exact=False, **options):
        return own(self, hidden_states, **options)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", dropping)
    caplog.set_level("INFO")
    assert load(backbones.folder("qwen3")).attention == "sdpa"
    assert "attention: sdpa (auto, without blocks: " in caplog.text
    with pytest.raises(BackboneError, match=r"packed rows cannot be attended to: blocks: .*attention=auto, or sdpa"):
        load(backbones.folder("qwen3"), attention="blocks")


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
