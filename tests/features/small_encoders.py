"""Small encoders of Hugging Face form with random weights, saved to folders as their authors would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

CONVOLUTIONAL = ("hubert", "wav2vec2", "wavlm")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}
WINDOW = 2  # seconds of the small Whisper's windows, where OpenAI's have 30


def save_convolutional(kind: str, folder: Path, norm: str = "group", seed: int = 0) -> PreTrainedModel:
    """A HuBERT, wav2vec 2 or WavLM; with `norm` layer, its extractor normalises and gives an attention mask, as the large ones do."""
    torch.manual_seed(seed)
    config, model = {
        "hubert": (HubertConfig, HubertModel),
        "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
        "wavlm": (WavLMConfig, WavLMModel),
    }[kind]
    made: PreTrainedModel = model(config(**SIZES, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")).eval()
    made.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=norm == "layer", return_attention_mask=norm == "layer").save_pretrained(
        folder
    )
    return made


def save_whisper(
    folder: Path, aligned: bool = True, seed: int = 0, spaces: bool = True
) -> WhisperForConditionalGeneration:
    """A Whisper that writes bytes, with windows of :data:`WINDOW` seconds."""
    tokenizer = _tokenizer(spaces)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20, chunk_length=WINDOW).save_pretrained(folder)
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=20,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=50 * WINDOW,
            max_target_positions=40,
            init_std=0.3,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=_id(tokenizer, "startoftranscript"),
        )
    ).eval()
    model.generation_config = GenerationConfig(
        max_length=40,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=_id(tokenizer, "startoftranscript"),
        no_timestamps_token_id=_id(tokenizer, "notimestamps"),
        is_multilingual=True,
        lang_to_id={f"<|{name}|>": _id(tokenizer, name) for name in ("en", "zh")},
        task_to_id={name: _id(tokenizer, name) for name in ("translate", "transcribe")},
        **({"alignment_heads": [[0, 0], [1, 1]]} if aligned else {}),
    )
    model.save_pretrained(folder)
    return model


def _tokenizer(spaces: bool) -> WhisperTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = ["Ġ" + letter for letter in "abcdefghijklmnopqrstuvwxyz"] if spaces else []
    vocab: dict[str, int] = {piece: i for i, piece in enumerate([*letters, *words])}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[("Ġ", word[1:]) for word in words])
    special = ["endoftext", "startoftranscript", "en", "zh", "translate", "transcribe", "startoflm", "startofprev"]
    special += ["nospeech", "notimestamps"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in special[1:]]})
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(50 * WINDOW + 1)])
    return tokenizer


def _id(tokenizer: Any, name: str) -> int:
    found: int = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    return found
