"""Small random models of several families, batches and tries for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.answer_tree import AnswerTree, Score
from trainer.batch import AnswerTrie, Batch, Features
from trainer.config import AdapterConfig, BackboneConfig, FusionConfig, TinyConfig
from trainer.models.backbone.causal_lm import Backbone, build_backbone, build_tiny
from trainer.models.egmf import EGMF
from trainer.models.fusion.network import Fusion
from trainer.models.layouts import PaddedLayout

TEXTS = [
    "Answer with one of: joy, anger, sadness.",
    "Oh no, what happened to you?",
    "今天天气很好，我很高兴。",
    "-1.0 0.3",
]
FAMILIES = ("qwen2", "qwen3", "llama", "glm", "glm4")


def save_family(family: str, folder: Path, tied: bool = False, **sizes: int) -> Path:
    """A random model of `family` (2 layers, width 64, uneven biases) with the tiny tokenizer, in `folder`."""
    build_tiny(TinyConfig(vocab_size=320), TEXTS, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(
        family,
        **{**shape, **sizes},
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases and norms differ from 0 and 1, so that losing one is seen
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, adapter: AdapterConfig | None = None, **changes) -> Backbone:
    torch.manual_seed(3)
    backbone = build_backbone(
        BackboneConfig(name=str(folder), **changes), adapter or AdapterConfig(dropout=0.0), dtype, "cpu"
    )
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:  # zero at first: an adapter that does nothing hides faults
            torch.nn.init.normal_(parameter, std=0.1)
    return backbone


ANSWERS = {"one": 3, "two": 5}


def make_fusion(backbone: Backbone, dtype: torch.dtype = torch.float32, **changes) -> Fusion:
    torch.manual_seed(5)
    config = FusionConfig(width=32, heads=2, dropout=0.0, pseudo_tokens=3, **changes)
    widths = {"one": {"audio": 6, "video": 5}, "two": {"audio": 4, "video": 0}}
    H = backbone.hidden_size
    return Fusion(config, widths, H, H, backbone.embedding_norm, ANSWERS).to(dtype)


def make_model(
    folder: Path, dtype: torch.dtype = torch.float32, fusion: bool = True, expert_loss_weight: float = 0.0, **changes
) -> EGMF:
    backbone = load(folder, dtype, **changes)
    return EGMF(backbone, make_fusion(backbone, dtype, expert_loss_weight=expert_loss_weight) if fusion else None)


def make_batch(
    lengths: Sequence[int], answers: Sequence[Sequence[int]] | None = None, pseudo: int = 3, pad: int = 0, seed: int = 0
) -> Batch:
    """Rows of random tokens with these context lengths; `pad` more columns than needed."""
    random = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    answers = answers or [[] for _ in lengths]
    context = [torch.randint(2, 320, (n,), generator=random).tolist() for n in lengths]
    tokens = [c + list(a[:-1]) for c, a in zip(context, answers, strict=True)]
    longest = max(map(len, tokens)) + pad
    longest_answer = max(map(len, answers))
    frames = 4

    def features(width: int) -> Features:
        values = torch.randn(rows, frames, width, generator=random)
        mask = torch.arange(frames) < torch.randint(1, frames + 1, (rows, 1), generator=random)
        return Features(values * mask[..., None], mask, torch.arange(frames).float().expand(rows, frames))

    return Batch(
        task="one",
        ids=[str(i) for i in range(rows)],
        input_ids_BL=torch.tensor([t + [1] * (longest - len(t)) for t in tokens]),
        context_length_B=torch.tensor(list(lengths)),
        pseudo_start=2,
        pseudo_tokens=pseudo,
        answer_ids_BA=torch.tensor([list(a) + [0] * (longest_answer - len(a)) for a in answers]),
        answer_mask_BA=torch.tensor([[i < len(a) for i in range(longest_answer)] for a in answers]),
        text_ids_BS=torch.randint(2, 320, (rows, 3), generator=random),
        text_mask_BS=torch.ones(rows, 3, dtype=torch.bool),
        audio=features(6),
        video=features(5),
        target_B=torch.zeros(rows),
        weight_B=torch.ones(rows),
        answer_B=torch.arange(rows) % 3,
    )


def rows_of(batch: Batch, keep: Sequence[int]) -> Batch:
    """The batch of some of the rows of `batch`, cut to what they need."""

    def pick(features: Features) -> Features:
        return Features(features.values_BTF[keep], features.mask_BT[keep], features.time_BT[keep])

    keep = list(keep)
    length = int((batch.context_length_B + (batch.answer_mask_BA.sum(1) - 1).clamp(min=0))[keep].max())
    return Batch(
        task=batch.task,
        ids=[batch.ids[i] for i in keep],
        input_ids_BL=batch.input_ids_BL[keep][:, :length],
        context_length_B=batch.context_length_B[keep],
        pseudo_start=batch.pseudo_start,
        pseudo_tokens=batch.pseudo_tokens,
        answer_ids_BA=batch.answer_ids_BA[keep],
        answer_mask_BA=batch.answer_mask_BA[keep],
        text_ids_BS=batch.text_ids_BS[keep],
        text_mask_BS=batch.text_mask_BS[keep],
        audio=pick(batch.audio),
        video=pick(batch.video),
        target_B=batch.target_B[keep],
        weight_B=batch.weight_B[keep],
        answer_B=batch.answer_B[keep],
    )


def make_trie(answers: Sequence[Sequence[int]], end: int = 0, score: Score = "full") -> AnswerTrie:
    return AnswerTree(tuple(map(str, answers)), tuple((*answer, end) for answer in answers)).trie(score)


def brute_force(
    model: EGMF, batch: Batch, answers: Sequence[Sequence[int]], score: Score = "full", end: int | None = None
) -> torch.Tensor:
    """The score of every answer with its end token, each as its own unpadded row through the language model's own forward. A token's
    probability is that in the vocabulary, or that among the tokens with which some answer goes on behind the same beginning."""
    end = model.end if end is None else end
    rows = [(*answer, end) for answer in answers]
    embeds_BLH, _ = model.embed(PaddedLayout(batch))
    scores = torch.zeros(len(batch), len(answers))
    for b in range(len(batch)):
        context = embeds_BLH[b, : batch.context_length_B[b]]
        for c, answer in enumerate(answers):
            row = torch.cat([context, model.backbone.embed(torch.tensor(answer))])[None]
            logits = model.backbone.model(inputs_embeds=row, use_cache=False).logits[0].float()
            logits_LV = logits.double()[len(context) - 1 :]
            for i, token in enumerate(rows[c]):
                following = sorted({other[i] for other in rows if other[:i] == rows[c][:i]})
                among = logits_LV[i] if score == "full" else logits_LV[i, following]
                scores[b, c] += logits_LV[i, token] - among.logsumexp(0)
    return scores
