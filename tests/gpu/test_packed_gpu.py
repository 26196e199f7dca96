"""What only a GPU can show of packed rows: every attention that runs there against the mask of the whole row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.answer_tree import AnswerTree
from trainer.batch import AnswerTrie, Packing
from trainer.config import AdapterConfig, BackboneConfig, TinyConfig
from trainer.models.backbone.causal_lm import Backbone, build_backbone, build_tiny
from trainer.models.backbone.loading import BackboneError, resolve_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WAYS = ("blocks", "varlen", "flash_attention_2", "flex")
LENGTHS = (24, 1, 37, 18, 90, 33)
Build = Callable[..., Backbone]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny backbone on the GPU by its attention; a way that is not installed skips the test with its reason."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape = TinyConfig(vocab_size=400, hidden_size=256, intermediate_size=512, heads=8, kv_heads=2, head_dim=64)
    build_tiny(shape, ["some words for a tokenizer"], folder)

    def build(way: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Backbone:
        device = torch.device("cuda")
        try:
            resolve_attention(way, device, dtype)
        except BackboneError as error:
            if "imported" in str(error) or "too old" in str(error) or "not installed" in str(error):
                pytest.skip(str(error))
            raise
        config = BackboneConfig.model_validate({"name": str(folder), "attention": way, **changes})
        torch.manual_seed(0)
        backbone = build_backbone(config, AdapterConfig(rank=4, dropout=0.0), dtype, device)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return backbone

    return build


def packing_of(prefix: int, lengths: tuple[int, ...], trie: AnswerTrie | None = None) -> Packing:
    return Packing(prefix, torch.tensor(lengths, device="cuda"), sum(lengths), max(lengths), trie)


def embeds_of(backbone: Backbone, packing: Packing) -> Tensor:
    ids = torch.randint(2, 400, (packing.prefix + packing.total,), generator=torch.Generator().manual_seed(1))
    return backbone.embed(ids.cuda()).detach()


def gradients(backbone: Backbone, embeds: Tensor, packing: Packing) -> tuple[Tensor, dict[str, Tensor]]:
    backbone.zero_grad()
    hidden = backbone.packed(embeds, packing)
    weight = torch.linspace(-1, 1, hidden.shape[1], device="cuda")
    (hidden.float() @ weight).square().mean().backward()
    found = {name: p.grad.float().clone() for name, p in backbone.named_parameters() if p.grad is not None}
    return hidden.detach().float(), found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("prefix", [0, 61])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_mask(build: Build, way: str, prefix: int) -> None:
    """Half precision: both differ from float32's by as much as rounding does."""
    packing = packing_of(prefix, LENGTHS)
    backbone, masked = build(way).train(), build("sdpa").train()
    embeds = embeds_of(masked, packing)
    got, found = gradients(backbone, embeds, packing)
    want, wanted = gradients(masked, embeds, packing)
    assert relative(got, want) < 2e-2
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 6e-2, name


@pytest.mark.parametrize("way", ["blocks", "flex"])
def test_float32_equals_the_mask(build: Build, way: str) -> None:
    packing = packing_of(40, LENGTHS)
    backbone, masked = build(way, torch.float32).eval(), build("sdpa", torch.float32).eval()
    embeds = embeds_of(masked, packing)
    with torch.no_grad():
        assert relative(backbone.packed(embeds, packing), masked.packed(embeds, packing)) < 5e-3  # TF32 in flex


@pytest.mark.parametrize("way", WAYS)
def test_samples_do_not_see_each_other(build: Build, way: str) -> None:
    packing = packing_of(20, LENGTHS)
    backbone = build(way).train()
    embeds = embeds_of(backbone, packing).requires_grad_()
    start = 20 + sum(LENGTHS[:2])
    backbone.packed(embeds, packing)[start : start + LENGTHS[2]].float().square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[20:start].abs().max() == 0
    assert embeds.grad[start + LENGTHS[2] :].abs().max() == 0
    assert embeds.grad[:20].abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_and_4_bits(build: Build, way: str, reentrant: bool) -> None:
    packing = packing_of(20, LENGTHS)
    plain = build(way, quantization="nf4").train()
    saving = build(way, quantization="nf4", gradient_checkpointing=True, reentrant=reentrant).train()
    embeds = embeds_of(plain, packing).requires_grad_()
    _, wanted = gradients(plain, embeds, packing)
    _, found = gradients(saving, embeds, packing)
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 2e-2, name


@pytest.mark.parametrize("way", WAYS)
def test_a_cached_prefix_and_rows_of_many_lengths(build: Build, way: str) -> None:
    """Many shapes one after another: what is compiled must not give up after a few."""
    backbone, masked = build(way).eval(), build("sdpa").eval()
    for count in range(1, 13):
        packing = packing_of(30, tuple(5 + (7 * i * count) % 60 for i in range(3 * count)))
        embeds = embeds_of(masked, packing)
        with torch.no_grad():
            want = masked.packed(embeds, packing)[30:].float()
            assert relative(backbone.packed(embeds, packing)[30:].float(), want) < 2e-2
            behind = backbone.packed(embeds[30:], packing, backbone.prefix(embeds[:30]))
            assert relative(behind.float(), want) < 2e-2


@pytest.mark.parametrize("way", WAYS)
def test_scoring_a_tree_is_blocks_in_float32(build: Build, way: str) -> None:
    trie = AnswerTree(("a", "b", "c"), ((5, 6, 0), (5, 6, 8, 0), (7, 9, 0))).trie("full")
    packing = packing_of(30, (12, 20), trie.to("cuda"))
    backbone, masked = build(way).eval(), build("sdpa").eval()
    embeds = embeds_of(masked, packing)
    with torch.no_grad():
        got, want = (b.packed(embeds, packing, fp32_attention=True).float() for b in (backbone, masked))
    assert relative(got, want) < 5e-3


@pytest.mark.parametrize("way", ["blocks", "sdpa", "varlen", "flash_attention_2"])
def test_no_pass_waits_for_the_device(build: Build, way: str) -> None:
    packing = packing_of(30, LENGTHS)
    backbone = build(way).train()
    embeds = embeds_of(backbone, packing)
    backbone.packed(embeds, packing).float().sum().backward()  # once: handles, workspaces
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        F.mse_loss(backbone.packed(embeds, packing).float(), embeds.float()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flex_on_a_gpu_is_compiled(build: Build) -> None:
    """Not torch's plain form, which holds all scores at once: memory of 8 times the row grows by about as much."""
    backbone = build("flex").eval()
    peaks = []
    for samples in (20, 160):
        packing = packing_of(30, (25,) * samples)
        embeds = embeds_of(backbone, packing)
        with torch.no_grad():
            backbone.packed(embeds, packing)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            backbone.packed(embeds, packing)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 24 * peaks[0]
