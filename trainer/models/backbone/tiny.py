"""The offline backbone: a random Qwen3 and a byte-level BPE tokenizer of the task's texts, in standard Hugging Face form.

Nothing is downloaded, and nothing is pre-trained: the frozen weights are random features that LoRA and the pseudo tokens
learn to read. Two things make them easy to teach. Logits must be able to grow: a normed hidden state reaches at most
width x `initializer_range` (at least 12, checked by :class:`trainer.config.TinyConfig`) x `HEAD_GAIN`. And each block adds
to the residual stream about as much as the embedding put in, not ten times as much: its two output matrices are times
`initializer_range`. Measured on "two words, four labels, answer (a + b) mod 4" with NF4 and LoRA, 250 steps of 32, four
seeds: p(answer) 0.39-0.97 without the gain, 0.95-1.00 with it; without the narrower blocks 0.31 after 300 steps. A gain
of 3 learns no better, and its larger scores cost digits: float32 is then no longer good for 1e-5 at -60.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trainer.config import TinyConfig
from trainer.files import load_json

END, PAD = "<|endoftext|>", "<|pad|>"
MARK = "tiny.json"  # what the folder was built from; only a folder that holds it is ever replaced
FORMAT = 1
HEAD_GAIN = 1.5

# Qwen's pre-tokenizer: every digit alone, so that numbers are spelled the same way everywhere.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tiny(config: TinyConfig, texts: Iterable[str], folder: Path) -> None:
    """Write the tiny backbone to `folder`: config, weights (safetensors, float32), tokenizer.

    The same config and texts give the same bytes. A folder built from the same is left as it is; one built from others is
    replaced, whole or not at all (built beside it, then renamed).

    Raises:
        ValueError: `folder` holds something that is no tiny backbone.
    """
    folder = Path(folder)
    texts = list(texts)
    made_from = {
        "format": FORMAT,
        "head_gain": HEAD_GAIN,
        "config": config.model_dump(mode="json"),
        "texts": _digest(texts),
    }
    mark = folder / MARK
    if mark.is_file() and load_json(mark.read_text(encoding="utf-8")) == made_from:
        return
    if folder.exists() and not mark.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is in the way: it is no tiny backbone (no {MARK} in it). Remove it, or name another"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tokenizer = _train_tokenizer(config, texts)
        tokenizer.save_pretrained(new)
        _random_model(config, tokenizer).save_pretrained(new)
        (new / MARK).write_text(json.dumps(made_from, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        new.chmod(0o777 & ~_umask())
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _train_tokenizer(config: TinyConfig, texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def tiny_shape(config: TinyConfig) -> Qwen3Config:
    """The tiny backbone's architecture; its special tokens are the tokenizer's to say."""
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        initializer_range=config.initializer_range,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
    )


def _random_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    shape = tiny_shape(config)
    shape.eos_token_id, shape.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed)
        model = Qwen3ForCausalLM(shape).float()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= config.initializer_range
            layer.mlp.down_proj.weight *= config.initializer_range
        model.lm_head.weight *= HEAD_GAIN
    return model


def _swap(new: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(new, folder)


def _digest(texts: list[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
