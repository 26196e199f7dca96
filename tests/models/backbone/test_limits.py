"""Rows beyond what a family allows are refused; up to there a sample's values do not hang on its neighbours."""

from __future__ import annotations

import pytest
import torch

from tests.models.families import FAMILIES, WINDOW, save_public
from tests.models.tiny_models import load, save_family
from trainer.batch import Packing
from trainer.config import AdapterConfig
from trainer.models.backbone import limits
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.loading import BackboneError


def pack(lengths, prefix=4, trie=None) -> Packing:
    return Packing(prefix, torch.tensor(lengths), sum(lengths), max(lengths), trie)


@pytest.mark.parametrize("name", ["Llama, dynamic NTK", "Phi 3, 128k (LongRoPE)"])
@torch.no_grad()
def test_rotary_scaling_that_depends_on_the_batch_ends_where_it_begins_to(tmp_path, name):
    backbone = load(save_public(FAMILIES[name], tmp_path / "model")).eval()
    ids_T = torch.randint(2, 320, (4 + 60 + 8,), generator=torch.Generator().manual_seed(0))
    want = backbone.model(input_ids=torch.cat([ids_T[:4], ids_T[64:]])[None], use_cache=False).logits[0, 4:]
    got = backbone.logits(backbone.packed(backbone.embed(ids_T), pack((60, 8))))[64:]  # beside one of just the length
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"a sample of 65 tokens is too long .*beyond 64 tokens.*data\.max_text_tokens"
    ):
        backbone.packed(backbone.embed(ids_T), pack((61, 7)))
    for call in (
        lambda: backbone.hidden(backbone.embed(ids_T[None, :65]), torch.arange(65)[None]),
        lambda: backbone.prefix(backbone.embed(ids_T[:65])),
    ):
        with pytest.raises(ValueError, match="a sample of 65 tokens is too long"):
            call()


@torch.no_grad()
def test_a_window_that_is_counted_in_places_ends_rows(tmp_path):
    backbone = load(save_public(FAMILIES["GPT-Neo"], tmp_path / "model")).eval()
    ids_T = torch.randint(2, 320, (WINDOW + 1,), generator=torch.Generator().manual_seed(0))
    row_T, lengths = ids_T[:WINDOW], (8, 4)
    got = backbone.logits(backbone.packed(backbone.embed(row_T), pack(lengths)))[4:]
    for own, part in zip(row_T[4:].split(lengths), got.split(lengths), strict=True):
        want = backbone.model(input_ids=torch.cat([row_T[:4], own])[None], use_cache=False).logits[0, 4:]
        torch.testing.assert_close(part, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"a packed row of 17 tokens .*window of 16 tokens.*data\.layout=padded"):
        backbone.packed(backbone.embed(ids_T), pack((8, 5)))
    positions_1L, seen = torch.arange(17)[None], torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
    backbone.hidden(backbone.embed(ids_T[None]), positions_1L)  # causal alone: places are positions
    with pytest.raises(ValueError, match=r"a row with its answers of 17 tokens .*eval\.mode=generate"):
        backbone.hidden(backbone.embed(ids_T[None]), positions_1L, seen)


def test_a_twin_that_cannot_be_made_ends_rows_at_the_window(tmp_path, monkeypatch):
    folder = save_family("mistral", tmp_path / "model", sliding_window=WINDOW)
    assert load(folder).limits == limits.RowLimits("mistral")

    def fail(*_):
        raise RuntimeError("no such size\nand more")

    monkeypatch.setattr(limits, "_twin", fail)
    assert load(folder).limits == limits.RowLimits("mistral", places=WINDOW)


def test_trying_windows_leaves_the_random_state_and_the_model_alone(tmp_path):
    folder = save_family("gemma2", tmp_path / "model", sliding_window=WINDOW, query_pre_attn_scalar=16)
    backbone = load(folder)
    before, config = torch.get_rng_state(), backbone.base.config.to_dict()
    limits.row_limits(backbone.base, lambda twin: type(backbone)(twin, backbone.tokenizer, "eager"), False)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.base.config.to_dict() == config


def test_experts_that_are_named_as_targets_are_refused_with_what_there_is(tmp_path):
    folder = save_public(FAMILIES["Qwen 2 MoE"], tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"'gate_proj' names experts, which are fused here .* there are: k_proj, o_proj"
    ):
        load(folder, adapter=AdapterConfig(targets=["q_proj", "gate_proj"], dropout=0.0))
    assert load(folder, adapter=AdapterConfig(targets=["q_proj", "v_proj"], dropout=0.1)).limits.places is None


@pytest.mark.parametrize(("change", "seen"), [(1e-5, False), (5e-4, True)])
def test_the_probe_allows_experts_their_rounding_and_no_more(tmp_path, monkeypatch, change, seen):
    """5e-4 is less than what values may differ from the model's own: the probe calls it what it is."""
    folder, own, calls = save_public(FAMILIES["Mixtral"], tmp_path / "model"), Backbone.packed, []

    def leaky(backbone, embeds_TH, packing, *arguments, **options):
        if packing.prefix == 2:  # the probe's, whose second call has another first sample
            calls.append(embeds_TH)
        hidden_TH = own(backbone, embeds_TH, packing, *arguments, **options)
        return hidden_TH * (1 + change) if packing.prefix == 2 and len(calls) == 2 else hidden_TH

    monkeypatch.setattr(Backbone, "packed", leaky)
    if seen:
        with pytest.raises(BackboneError, match="sdpa: samples see each other"):
            load(folder, attention="sdpa")
    else:
        load(folder, attention="sdpa")
