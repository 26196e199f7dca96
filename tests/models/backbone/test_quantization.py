"""NF4 and its traps on CPUs: values, storage, sizes, and gradients after an evaluation."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn

from tests.models.tiny_models import load, make_batch, make_model, make_trie, save_family
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.causal_lm import build_backbone
from trainer.models.generation import generate

# The 16 values of NF4 (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_family(name, tmp_path_factory.mktemp("models") / name) for name in ("qwen2", "llama")}


def test_what_is_quantised_and_how_it_is_stored(folders):
    backbone = load(folders["qwen2"], quantization="nf4")
    layers = [m for m in backbone.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.nested
        assert layer.support_avx512bf16_for_cpu is False
        assert layer.compute_dtype == torch.float32
    assert type(backbone.base.get_output_embeddings()) is nn.Linear
    assert backbone.base.get_input_embeddings().weight.dtype == torch.float32
    assert backbone.base.get_output_embeddings().weight.dtype == torch.float32
    single = load(folders["qwen2"], quantization="nf4", double_quantization=False)
    assert not any(m.weight.quant_state.nested for m in single.modules() if isinstance(m, Linear4bit))


def test_a_tied_embedding_is_not_quantised(tmp_path):
    backbone = load(save_family("qwen3", tmp_path / "m", tied=True), quantization="nf4")
    embedding, head = backbone.base.get_input_embeddings(), backbone.base.get_output_embeddings()
    assert embedding.weight is head.weight
    assert embedding.weight.dtype == torch.float32


def test_a_layer_computes_with_the_nearest_of_sixteen_values_per_block(folders):
    backbone = load(
        folders["qwen2"], quantization="nf4", double_quantization=False, adapter=AdapterConfig(kind="frozen")
    )
    layer = backbone.base.model.layers[0].mlp.down_proj
    weight = load_file(folders["qwen2"] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    rounded = NF4[(blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)] * scale
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ rounded.reshape_as(weight).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_after_an_evaluation_equal_those_before(folders, family, dtype):
    model = make_model(folders[family], dtype, quantization="nf4")
    batch = make_batch([9, 6, 14, 7], [[5, 0], [5, 6, 0], [7, 8, 9, 0], [11, 0]]).to("cpu", dtype)

    def gradients():
        model.train()
        model.zero_grad()
        model(batch).loss_B.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    def state():
        return {name: value.clone() for name, value in model.state_dict().items()}

    before, stored = gradients(), state()
    model.eval()
    with torch.no_grad():
        model(batch, make_trie([[5], [7, 8]]))
    generate(model, batch, 3)
    after = gradients()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert all(before[name].abs().max() > 0 for name in before if "lora_A" in name)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())  # nothing was repacked


@pytest.mark.parametrize(
    ("sizes", "module"),
    [
        ({"hidden_size": 96, "num_attention_heads": 4, "head_dim": 32}, r"q_proj \(in_features 96, 2 of them\)"),
        ({"intermediate_size": 100}, r"down_proj \(in_features 100, 2 of them\)"),
        ({"head_dim": 8}, r"o_proj \(in_features 32, 2 of them\)"),
    ],
)
def test_sizes_that_break_a_block_are_refused_by_name_before_loading(tmp_path, monkeypatch, sizes, module):
    folder = save_family("llama", tmp_path / "m", **sizes)
    (folder / "model.safetensors").unlink()
    config = BackboneConfig(name=str(folder), quantization="nf4")
    with pytest.raises(ValueError, match=rf"not multiples of 64: .*{module}"):
        build_backbone(config, AdapterConfig(), torch.float32, "cpu")
