"""Every family of docs/backbones.md: packed and padded rows against the model's own forward, one sample at a time; NF4, LoRA, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.models.families import FAMILIES, WINDOW, Family, save_public
from trainer.batch import Packing
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.causal_lm import Backbone, build_backbone

PREFIX, LENGTHS = 5, (12, 30, 7)  # longer than a window, shorter than a length beyond which rotary frequencies change
QUICK = {  # of each kind one: `make test` runs these, and those that are refused
    "Llama 2, 3", "Mistral", "Mixtral", "Gemma 3", "Phi 3, 128k (LongRoPE)", "GPT-2", "GPT-Neo", "Falcon", "Qwen 3 MoE",
}  # fmt: skip
LOADED = [
    pytest.param(family, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, family in FAMILIES.items()
    if family.refused is None
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(family: Family) -> Path:
        key = str(family)
        if key not in made:
            made[key] = save_public(family, root / str(len(made)))
        return made[key]

    return get


def load(folder: Path, quantization: str = "none") -> Backbone:
    torch.manual_seed(3)
    config, adapter = BackboneConfig(name=str(folder), quantization=quantization), AdapterConfig(dropout=0.0, rank=4)
    backbone = build_backbone(config, adapter, torch.float32, "cpu").eval()
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:  # zero at first: an adapter that does nothing hides faults
            torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def token_ids() -> torch.Tensor:
    return torch.randint(2, 320, (PREFIX + sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def alone(backbone: Backbone, ids_T: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each sample by the model's own forward, behind the prefix."""
    rows = [torch.cat([ids_T[:PREFIX], own])[None] for own in ids_T[PREFIX:].split(LENGTHS)]
    return [backbone.model(input_ids=row, use_cache=False).logits[0, PREFIX:] for row in rows]


def assert_same(got: torch.Tensor, want: torch.Tensor, family: Family) -> None:
    """Equal at every token; where experts are chosen, at all but two: the choice between two that are next to equal is rounding."""
    error_T = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert int((error_T > 1e-4).sum()) <= (2 if family.experts else 0), error_T


@pytest.mark.parametrize("family", LOADED)
def test_packed_and_padded_rows_are_the_models_own(family, folders):
    backbone, ids_T = load(folders(family)), token_ids()
    assert (backbone.limits.positions, backbone.limits.places) == (family.positions, family.places)
    packing = Packing(PREFIX, torch.tensor(LENGTHS), sum(LENGTHS), max(LENGTHS))
    adapted = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert adapted
    assert not any("experts" in name for name in adapted)
    with torch.no_grad():
        want = alone(backbone, ids_T)
        for b, own in enumerate(ids_T[PREFIX:].split(LENGTHS)):  # padded on the right, by tokens of another sample
            row = torch.cat([ids_T[:PREFIX], own, ids_T[:3]])[None]
            hidden = backbone.hidden(backbone.embed(row), torch.arange(row.shape[1])[None])
            assert_same(backbone.logits(hidden)[0, PREFIX : PREFIX + len(own)], want[b], family)
        if family.places is not None:
            with pytest.raises(ValueError, match=r"packed row of 54 tokens .*'gpt_neo'.*data\.layout=padded"):
                backbone.packed(backbone.embed(ids_T), packing)
            return
        got = backbone.logits(backbone.packed(backbone.embed(ids_T), packing))[PREFIX:]
        assert_same(got, torch.cat(want), family)
        cache = backbone.prefix(backbone.embed(ids_T[:PREFIX]))
        behind = backbone.logits(backbone.packed(backbone.embed(ids_T[PREFIX:]), packing, cache))
        assert_same(behind, torch.cat(want), family)


@pytest.mark.parametrize("family", LOADED)
def test_gradients_reach_every_adapted_layer(family, folders):
    backbone, ids_T = load(folders(family)).train(), token_ids()[: PREFIX + 9]
    packing = Packing(PREFIX, torch.tensor([6, 3]), 9, 6)
    embeds_TH = backbone.embed(ids_T).detach().requires_grad_()
    if family.places is not None:
        hidden = backbone.hidden(embeds_TH[None], torch.arange(len(ids_T))[None])[0]
    else:
        hidden = backbone.packed(embeds_TH, packing)
    backbone.logits(hidden).logsumexp(-1).sum().backward()
    without = [
        n
        for n, p in backbone.named_parameters()
        if p.requires_grad and not (p.grad is not None and p.grad.abs().max() > 0)
    ]
    assert without == []
    assert embeds_TH.grad.isfinite().all()


@pytest.mark.parametrize("family", LOADED)
def test_four_bits_are_the_models_own_or_refused(family, folders):
    folder = folders(family)
    if family.nf4 is not None:
        with pytest.raises(ValueError, match=family.nf4):
            load(folder, "nf4")
        return
    backbone, ids_T = load(folder, "nf4"), token_ids()
    with torch.no_grad():
        want = torch.cat(alone(backbone, ids_T))
        if family.places is not None:
            return
        packing = Packing(PREFIX, torch.tensor(LENGTHS), sum(LENGTHS), max(LENGTHS))
        got = backbone.logits(backbone.packed(backbone.embed(ids_T), packing))[PREFIX:]
    assert_same(got, want, family)


@pytest.mark.parametrize("family", [pytest.param(f, id=n) for n, f in FAMILIES.items() if f.refused is not None])
def test_what_is_not_supported_is_refused_by_name(family, folders):
    with pytest.raises(ValueError, match=re.escape(family.refused)):
        load(folders(family))


def test_the_table_of_the_docs_has_every_family():
    text = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for name, family in FAMILIES.items():
        cells = [cell.strip() for cell in rows[name].split("|")[2:-1]]
        assert len(cells) == 6, name
        packed, padded, nf4, lora, zero3 = cells[1:]
        if family.refused:
            assert {packed, padded, nf4, lora, zero3} == {"refused"}
            continue
        limit = family.places or family.positions
        assert (packed == "yes") == (limit is None), name
        assert (padded == "yes") == (limit is None), name
        assert nf4 == ("refused" if family.nf4 else "yes"), name
        assert lora == ("beside the experts" if family.experts else "yes"), name
        assert zero3 == "yes", name
    assert max(LENGTHS) > WINDOW
