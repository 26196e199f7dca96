"""The baseline of the throughput benchmark: multimodal tuning of a language model as published scripts do it.

After the MSE-Adapter (Yang et al. 2025, arXiv 2502.12478; its published configs give the sizes), written anew:

- texts are tokenised once and padded to the length of the published file (65 or 50), audio and video are arrays of
  the file's fixed number of frames (157 and 32, 500 and 375, 925 and 232);
- every row repeats the instruction: ``instruction <Multimodal> [K pseudo tokens] text </Multimodal> cue answer end``;
- one-layer LSTMs (64 and 32 or 64 wide) read audio and video up to their true lengths (packed sequences); their last
  states and the mean of the text's embeddings go through a small network that makes K = 4 pseudo tokens;
- labels are -100 outside the answer, and the loss is the language model's own, so logits are made at every position;
- no attention mask is passed; evaluation is `generate`, greedy, until the longest answer and its end;
- batches of 8, in random order; AdamW.

Nothing is slowed down on purpose: tokenising and padding are done before anything is timed, and attention is
PyTorch's fused one (sdpa, causal). Micro-batches of 16 or 32 and unpacked LSTMs change its speed by less than 15 %
either way. What it leaves out of published code (auxiliary losses, multi-scale fusion) would only cost more.

Shapes: B samples, T frames, F features of a frame, S text tokens, K pseudo tokens, H hidden size, L positions, A
answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.shapes import Shape
from trainer.answers.predictions import parse_answers
from trainer.batch import Sample
from trainer.config import DataConfig
from trainer.data.collate import prompt_texts
from trainer.text import encode

PSEUDO_TOKENS, WIDTH = 4, 64
AUDIO_WIDTH, VIDEO_WIDTH = 64, {"meld": 32, "mosei": 32, "simsv2": 64}
IGNORED = -100


@dataclass
class PaddedBatch:
    text_BS: Tensor
    audio_BTF: Tensor
    video_BTF: Tensor
    audio_length_B: Tensor
    video_length_B: Tensor
    answer_BA: Tensor  # with the end token, padded by IGNORED

    def to(self, device: torch.device | str) -> PaddedBatch:
        return PaddedBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class PaddedData:
    """All samples as padded arrays in memory, as the published loaders hold them; a batch is rows of them."""

    def __init__(self, shape: Shape, samples: Sequence[Sample], folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        task, end = shape.task, tokenizer.eos_token_id
        self.text_NS = np.full((len(samples), shape.text_end), tokenizer.pad_token_id, dtype=np.int64)
        for row, sample in zip(self.text_NS, samples, strict=True):
            ids = encode(tokenizer, sample.text)[: shape.text_end]
            row[: len(ids)] = ids
        self.arrays: dict[str, np.ndarray] = {}
        self.lengths: dict[str, np.ndarray] = {}
        for name, (width, _, frames) in shape.streams.items():
            arrays = [getattr(sample, f"{name}_TF") for sample in samples]
            self.arrays[name] = np.zeros((len(samples), frames, width), dtype=np.float32)
            for row, value in zip(self.arrays[name], arrays, strict=True):
                row[: len(value)] = value
            self.lengths[name] = np.array([len(value) for value in arrays])
        answers = [[*encode(tokenizer, text), end] for text in task.answer_texts()]
        self.longest_answer = max(map(len, answers))
        self.answers = [answers[task.answer_index(sample.target)] for sample in samples]
        before, after = prompt_texts(task, DataConfig())
        self.before = torch.tensor(encode(tokenizer, before))
        self.after = torch.tensor(encode(tokenizer, after))
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[int]) -> PaddedBatch:
        rows = list(rows)
        longest = max(len(self.answers[i]) for i in rows)
        answer_BA = torch.tensor([self.answers[i] + [IGNORED] * (longest - len(self.answers[i])) for i in rows])
        return PaddedBatch(
            torch.from_numpy(self.text_NS[rows]),
            torch.from_numpy(self.arrays["audio"][rows]),
            torch.from_numpy(self.arrays["video"][rows]),
            torch.from_numpy(self.lengths["audio"][rows]),
            torch.from_numpy(self.lengths["video"][rows]),
            answer_BA,
        )


class PaddedModel(nn.Module):
    """LSTM encoders and a small fusion network before a language model with LoRA on all its linear layers."""

    def __init__(self, language_model: nn.Module, data: PaddedData, shape: Shape) -> None:
        super().__init__()
        self.language_model = language_model
        self.embedding = language_model.get_input_embeddings()
        hidden = self.embedding.embedding_dim
        self.audio = nn.LSTM(shape.widths[0], AUDIO_WIDTH, batch_first=True)
        self.video = nn.LSTM(shape.widths[1], VIDEO_WIDTH[shape.name], batch_first=True)
        self.text = nn.Linear(hidden, WIDTH)
        self.fuse = nn.Sequential(
            nn.Linear(AUDIO_WIDTH + VIDEO_WIDTH[shape.name] + WIDTH, hidden),
            nn.GELU(),
            nn.Linear(hidden, PSEUDO_TOKENS * hidden),
            nn.Unflatten(1, (PSEUDO_TOKENS, hidden)),
        )
        self.register_buffer("before", data.before, persistent=False)
        self.register_buffer("after", data.after, persistent=False)
        self.end, self.pad = data.tokenizer.eos_token_id, data.tokenizer.pad_token_id

    def loss(self, batch: PaddedBatch) -> Tensor:
        """The language model's own loss: the mean over the answers' tokens."""
        context_BLH = self._context(batch)
        answer_BAH = self.embedding(batch.answer_BA.clamp(min=0))
        labels_BL = batch.answer_BA.new_full(context_BLH.shape[:2], IGNORED)
        return self.language_model(
            inputs_embeds=torch.cat([context_BLH, answer_BAH], 1),
            labels=torch.cat([labels_BL, batch.answer_BA], 1),
        ).loss

    @torch.no_grad()
    def generate(self, batch: PaddedBatch, longest: int) -> Tensor:
        """The most likely tokens, at most `longest`, ended by the end token where it comes."""
        context_BLH = self._context(batch)
        return self.language_model.generate(
            inputs_embeds=context_BLH,
            attention_mask=torch.ones(context_BLH.shape[:2], dtype=torch.long, device=context_BLH.device),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )

    def _context(self, batch: PaddedBatch) -> Tensor:
        text_BSH = self.embedding(batch.text_BS)
        read_BN = torch.cat(
            [
                _last_state(self.audio, batch.audio_BTF, batch.audio_length_B),
                _last_state(self.video, batch.video_BTF, batch.video_length_B),
                self.text(text_BSH.float().mean(1)),
            ],
            1,
        )
        B = len(text_BSH)
        before_BLH = self.embedding(self.before).expand(B, -1, -1)
        after_BLH = self.embedding(self.after).expand(B, -1, -1)
        return torch.cat([before_BLH, self.fuse(read_BN).to(text_BSH.dtype), text_BSH, after_BLH], 1)


def _last_state(lstm: nn.LSTM, values_BTF: Tensor, length_B: Tensor) -> Tensor:
    packed = pack_padded_sequence(values_BTF, length_B.cpu(), batch_first=True, enforce_sorted=False)
    return lstm(packed)[1][0][-1]


def build_padded(shape: Shape, data: PaddedData, folder: Path, lora_rank: int) -> PaddedModel:
    """The baseline on the language model in `folder`, frozen, in float32."""
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    language_model.requires_grad_(False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    return PaddedModel(get_peft_model(language_model, lora), data, shape).train()


def answered(shape: Shape, data: PaddedData, tokens: Tensor) -> int:
    """How many of the generated rows parse as an answer (a random model's: hardly any)."""
    texts = data.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return int(parse_answers(shape.task, texts).valid_B.sum())
