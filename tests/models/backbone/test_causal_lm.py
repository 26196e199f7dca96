"""Loading: every fault in words, the kernel that was asked for, the adapter that was asked for, frozen weights known by a hash."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.models.tiny_models import FAMILIES, TEXTS, brute_force, load, make_batch, make_model, make_trie, save_family
from trainer.config import AdapterConfig, BackboneConfig, TinyConfig
from trainer.models.backbone.causal_lm import base_fingerprint, build_backbone, build_tiny, load_tokenizer
from trainer.models.backbone.loading import BackboneError, load_shape, resolve_attention
from trainer.models.backbone.packed import NAME

ANSWERS = [[5], [5, 6], [7, 8, 9], [11]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_family("qwen2", tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture
def copy(qwen, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for file in qwen.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def build(folder, adapter=None, dtype=torch.float32, **changes):
    return build_backbone(BackboneConfig(name=str(folder), **changes), adapter or AdapterConfig(), dtype, "cpu")


# The families


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_three_steps_give_the_models_own_logits(tmp_path, family, tied):
    backbone = load(save_family(family, tmp_path / "m", tied=tied)).eval()
    ids = torch.randint(2, 320, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids, use_cache=False).logits
        adapted = backbone.model(input_ids=ids, use_cache=False).logits
        got = backbone.logits(backbone.hidden(backbone.embed(ids), torch.arange(11).expand(3, 11)))
    torch.testing.assert_close(got, adapted, atol=1e-5, rtol=0)
    assert (adapted - own).abs().max() > 0.1  # LoRA is there and does something


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 8}),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5}),
        ("cohere", {"logit_scale": 0.25}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_families_that_scale_logits_or_attend_in_windows_are_reproduced(tmp_path, family, sizes):
    model = make_model(save_family(family, tmp_path / "m", **sizes), fusion=False).eval()
    batch = make_batch([9, 6, 14], pseudo=0, pad=2)
    with torch.no_grad():
        got = model(batch, make_trie(ANSWERS)).logprob_BC
        torch.testing.assert_close(got, brute_force(model, batch, ANSWERS), atol=1e-5, rtol=0)


@pytest.fixture
def dropping_sdpa(monkeypatch):
    """transformers 5.17: Gemma 2 attends through sdpa, which drops the soft cap of its scores without a word."""
    from transformers import Gemma2PreTrainedModel
    from transformers.integrations import sdpa_attention

    def dropped(*arguments, softcap=None, **options):
        return sdpa_attention.sdpa_attention_forward(*arguments, **options)

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    monkeypatch.setattr("trainer.models.backbone.packed.sdpa_attention_forward", dropped)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", dropped)


@pytest.mark.parametrize("asked", ["auto", "eager"])
def test_a_soft_cap_of_scores_is_kept(tmp_path, dropping_sdpa, asked):
    folder = save_family("gemma2", tmp_path / "m", attn_logit_softcapping=0.5)
    backbone = build(folder, attention=asked).eval()
    assert backbone.attention == "eager"
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids, use_cache=False).logits
        got = backbone.logits(backbone.hidden(backbone.embed(ids), torch.arange(38)[None]))
    torch.testing.assert_close(got, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("asked", ["sdpa", "blocks", "varlen"])
def test_attention_that_leaves_out_a_soft_cap_is_refused(tmp_path, dropping_sdpa, asked):
    folder = save_family("gemma2", tmp_path / "m", attn_logit_softcapping=0.5)
    with pytest.raises(
        BackboneError, match=f"cap their attention's scores softly, which .*attention={asked} leaves out"
    ):
        build(folder, attention=asked)


def test_the_probe_notices_a_cap_that_is_dropped(tmp_path, dropping_sdpa, monkeypatch):
    folder = save_family("gemma2", tmp_path / "m", attn_logit_softcapping=0.05)
    monkeypatch.setattr("trainer.models.backbone.loading._with_soft_cap", lambda config, shape, attention: "sdpa")
    with pytest.raises(BackboneError, match="'gemma2' are not supported: logits differ from the model's own"):
        build(folder, attention="sdpa")


def test_a_family_whose_layers_cannot_see_a_tree_is_refused_by_name(tmp_path):
    folder = save_family("qwen3_next", tmp_path / "m")
    with pytest.raises(BackboneError, match=r"'qwen3_next' are not supported: .*linear_attention"):
        build(folder)


def test_a_head_that_is_not_reproduced_is_refused(qwen, monkeypatch):
    from transformers import Qwen2ForCausalLM

    own = Qwen2ForCausalLM.forward

    def scaled(self, *arguments, **options):
        out = own(self, *arguments, **options)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", scaled)
    with pytest.raises(BackboneError, match="'qwen2' are not supported: logits differ"):
        build(qwen)


# Attention


def test_auto_attention_takes_flash_only_where_it_runs(monkeypatch):
    assert resolve_attention("auto", CPU, torch.bfloat16) is None
    assert resolve_attention("eager", CPU, torch.float32) == "eager"
    working = types.ModuleType("flash_attn")
    working.flash_attn_func = lambda: None
    monkeypatch.setitem(sys.modules, "flash_attn", working)
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "flash_attention_2"
    assert resolve_attention("auto", CUDA, torch.float32) is None
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    recent = types.ModuleType("torch.nn.attention.varlen")
    recent.varlen_attn = lambda query, key, value, *, window_size=None, enable_gqa=False: None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", recent)
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "varlen"  # PyTorch's own
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # an older torch has none
    assert resolve_attention("auto", CUDA, torch.bfloat16) is None
    with pytest.raises(BackboneError, match="lacks its CUDA extension"):
        resolve_attention("flash_attention_2", CUDA, torch.bfloat16)


def test_flash_attention_that_cannot_run_is_refused_with_every_reason(qwen, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(
        BackboneError, match=r"CUDA device, and this run is on cpu; .*gives float32; .*cannot be imported"
    ):
        build(qwen, attention="flash_attention_2")


def test_two_models_of_one_config_keep_their_own_kernels(qwen):
    eager, sdpa = build(qwen, attention="eager"), build(qwen, attention="sdpa")
    assert (eager.attention, sdpa.attention, build(qwen).attention) == ("eager", "sdpa", "blocks")
    assert eager.base.config._attn_implementation == "eager"
    assert sdpa.base.config._attn_implementation == NAME
    assert eager.base.config.use_cache is False


def test_an_exact_pass_in_half_precision_attends_in_float32(qwen, monkeypatch):
    backbone = build(qwen, dtype=torch.bfloat16).eval()
    seen = []
    own = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *arguments, **options):
        seen.append(query.dtype)
        return own(query, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    embeds, positions = backbone.embed(torch.arange(2, 11)[None]), torch.arange(9)[None]
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        exact = backbone.hidden(embeds, positions, mask, fp32_attention=True)
        assert set(seen) == {torch.float32}
        assert exact.dtype == torch.bfloat16
        seen.clear()
        backbone.hidden(embeds, positions, mask)
        assert set(seen) == {torch.bfloat16}


def test_a_kernel_without_masks_leaves_scoring_to_sdpa(qwen, monkeypatch):
    """flash-attn cannot run here: a module of its name stands for it, and only rows without a mask reach it."""
    model = make_model(qwen).eval()
    batch = make_batch([9, 6, 14])
    embeds, positions = model.backbone.embed(batch.input_ids_BL), torch.arange(14).expand(3, 14)
    calls = []

    def flash_attn_func(query, key, value, *, dropout_p, softmax_scale, causal, deterministic):
        calls.append(query.shape)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=softmax_scale, dropout_p=dropout_p, enable_gqa=True
        )
        return out.transpose(1, 2)

    standing = types.ModuleType("flash_attn")
    standing.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", standing)
    with torch.no_grad():
        want = model(batch, make_trie(ANSWERS)).logprob_BC, model.backbone.hidden(embeds, positions)
        model.backbone.attention = "flash_attention_2"
        assert torch.equal(model(batch, make_trie(ANSWERS)).logprob_BC, want[0])
        assert not calls
        torch.testing.assert_close(model.backbone.hidden(embeds, positions), want[1], atol=1e-5, rtol=1e-5)
    assert calls == [(3, 14, 4, 16)] * 2


def test_an_exact_pass_with_gradients_is_recomputed_exactly(qwen):
    batch = make_batch([9, 6]).to("cpu", torch.bfloat16)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(qwen, torch.bfloat16, gradient_checkpointing=checkpointing).train()
        model(batch, make_trie(ANSWERS)).logprob_BC.sum().backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters() if p.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


# Faults


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(BackboneError, match="no model folder"):
        build(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BackboneError, match=r"without config\.json"):
        build(tmp_path)


def test_tiny_needs_its_folder(tmp_path):
    with pytest.raises(BackboneError, match="give that folder"):
        build("tiny")
    with pytest.raises(BackboneError, match="no tiny backbone in"):
        load_tokenizer(BackboneConfig(), tmp_path)


def test_a_hub_name_offline_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"not in the local cache .*HF_HUB_OFFLINE is set.*hf download some/model"):
        build("some/model")


def test_pickled_weights_are_not_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no safetensors weights"):
        build(copy)


def test_own_code_is_refused_with_the_way_to_allow_it(copy):
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own_model"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(BackboneError, match=r"own code.*trust_remote_code=true"):
        load_shape(BackboneConfig(name=str(copy)))


def test_what_is_no_causal_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "t5"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="not a causal language model"):
        build(copy)


def test_weights_that_are_missing_are_not_invented(copy):
    state = load_file(copy / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"1 weights are not in its files.*layers\.1\.mlp\.up_proj"):
        build(copy)


def test_a_truncated_file_is_a_fault_in_words(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        BackboneError,
        match=r"model\.safetensors is cut short: 231,900 of 463,800 bytes, without model\.layers\.0.*fetch it again",
    ):
        build(copy)


def test_a_model_that_is_already_quantised_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"already quantised \(gptq\)"):
        build(copy)


def test_a_tokenizer_larger_than_the_model_is_refused(copy, tmp_path):
    build_tiny(TinyConfig(vocab_size=600), [*TEXTS, *(f"word{i} {i * 'x'}" for i in range(60))] * 3, tmp_path / "t")
    (copy / "tokenizer.json").write_bytes((tmp_path / "t" / "tokenizer.json").read_bytes())
    with pytest.raises(BackboneError, match=r"tokenizer has \d+ tokens, the model only 320"):
        build(copy)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = save_family("qwen3", tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="no end-of-sequence token"):
        build(folder)


# Adapters


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_lora_is_trained_in_the_dtype_of_training(qwen, quantization, dtype):
    backbone = build(qwen, AdapterConfig(rank=4), dtype, quantization=quantization)
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B, seven layers, twice
    assert all("lora_" in name and p.dtype == dtype for name, p in trained.items())
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {4}


def test_full_and_frozen(qwen):
    full = build(qwen, AdapterConfig(kind="full"))
    assert all(p.requires_grad for p in full.parameters())
    assert not any(p.requires_grad for p in build(qwen, AdapterConfig(kind="frozen")).parameters())


def test_listed_targets_and_the_faults_of_a_list(qwen):
    backbone = build(qwen, AdapterConfig(targets=["q_proj", "1.mlp.up_proj"]))
    adapted = {
        name.split(".lora_")[0].split("model.layers.")[1] for name, p in backbone.named_parameters() if p.requires_grad
    }
    assert adapted == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}
    with pytest.raises(
        ValueError, match=r"'q_pro' names no linear layer; did you mean q_proj.*'lm_head' is the output head"
    ):
        build(qwen, AdapterConfig(targets=["q_pro", "lm_head", "k_proj"]))
    with pytest.raises(ValueError, match=r"'query_key_value' names no linear layer; .*q_proj"):
        build(qwen, AdapterConfig(targets=["query_key_value"]))
    with pytest.raises(ValueError, match="list is empty"):
        build(qwen, AdapterConfig(targets=[]))


def test_an_embedding_is_no_target(qwen):
    with pytest.raises(ValueError, match="'embed_tokens' names no linear layer"):
        build(qwen, AdapterConfig(targets=["embed_tokens"]))


# Measures of the frozen weights


def test_the_embedding_norm_is_the_mean_length_of_the_tokens_in_use(qwen):
    backbone = build(qwen)
    used = len(backbone.tokenizer)
    weight = load_file(qwen / "model.safetensors")["model.embed_tokens.weight"][:used]
    assert backbone.embedding_norm == pytest.approx(float(weight.double().norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_fingerprint_knows_every_frozen_weight(copy, quantization):
    first = build(copy, quantization=quantization)
    assert first.fingerprints.stored == base_fingerprint(first)
    assert first.fingerprints == build(copy, quantization=quantization).fingerprints
    assert (first.fingerprint == first.fingerprints.stored) == (quantization == "none")
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert base_fingerprint(first) == first.fingerprints.stored  # trained weights are no part of it
    frozen = build(copy, AdapterConfig(kind="frozen"), quantization=quantization)
    assert frozen.fingerprints == first.fingerprints
    state = load_file(copy / "model.safetensors")
    for name in (
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ):
        changed = {key: value.clone() for key, value in state.items()}
        changed[name].view(-1)[17] += 0.5
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        assert build(copy, quantization=quantization).fingerprint != first.fingerprint, name


def test_double_quantisation_and_dtype_show_in_the_fingerprint(qwen):
    marks = [
        build(qwen, quantization="nf4").fingerprint,
        build(qwen, quantization="nf4", double_quantization=False).fingerprint,
        build(qwen).fingerprint,
        build(qwen, dtype=torch.bfloat16).fingerprint,
    ]
    assert len(set(marks)) == 4


def test_remote_code_is_a_warning(qwen, caplog):
    load_tokenizer(BackboneConfig(name=str(qwen)))
    assert "trust_remote_code" not in caplog.text
    load_tokenizer(BackboneConfig(name=str(qwen), trust_remote_code=True))
    assert f"code that comes with {qwen} (revision newest) runs on this machine" in caplog.text
