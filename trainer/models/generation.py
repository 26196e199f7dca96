"""Generation: the most likely text after each context, token by token, of all texts or of a task's answers.

Shapes: B rows, L positions, S positions seen so far, H backbone hidden size, P places of a tree of answers, W options of a place, m
tokens that are options.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.answer_tree import AnswerTree
from trainer.batch import Batch
from trainer.models.egmf import EGMF
from trainer.models.layouts import PaddedLayout, gather_positions


class Grammar(NamedTuple):
    """What may follow where in the answers of a task, on a device: from place p, option w leads to place `next_PW[p, w]`. The last
    place stands behind every answer; nothing but the end token follows there."""

    token_m: Tensor
    option_PW: Tensor  # counts tokens of `token_m`
    mask_PW: Tensor
    next_PW: Tensor

    @classmethod
    def of(cls, tree: AnswerTree, device: torch.device) -> Grammar:
        place, behind = {before: p for p, before in enumerate(tree.options)}, len(tree.options)
        tokens = list(dict.fromkeys(token for options in tree.options.values() for token in options))
        widest = max(map(len, tree.options.values()))
        option_PW = torch.zeros(behind + 1, widest, dtype=torch.long)
        mask_PW = torch.zeros(behind + 1, widest, dtype=torch.bool)
        next_PW = torch.full((behind + 1, widest), behind)
        for before, options in tree.options.items():
            p, count = place[before], len(options)
            option_PW[p, :count] = torch.tensor([tokens.index(token) for token in options])
            mask_PW[p, :count] = True
            next_PW[p, :count] = torch.tensor([place.get((*before, token), behind) for token in options])
        option_PW[behind, 0], mask_PW[behind, 0] = tokens.index(tree.end), True
        return cls(*(t.to(device) for t in (torch.tensor(tokens), option_PW, mask_PW, next_PW)))


@torch.no_grad()
def generate(model: EGMF, batch: Batch, max_new_tokens: int, tree: AnswerTree | None = None) -> list[str]:
    """The texts that greedy decoding gives, without their end tokens and otherwise as decoded.

    With a `tree` only tokens are taken that continue, or end, one of its answers: of an answer's length at least, `max_new_tokens` make
    every text one of them. Dropout is off. With several processes every one makes all `max_new_tokens` steps (ZeRO-3 needs equal calls).
    """
    was_training = model.training
    model.eval()
    try:
        grammar = None if tree is None else Grammar.of(tree, batch.input_ids_BL.device)
        token_ids = _decode(model, batch, max_new_tokens, grammar).tolist()
    finally:
        model.train(was_training)
    kept = [row[: row.index(model.end)] if model.end in row else row for row in token_ids]
    return [str(model.backbone.tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in kept]


def _decode(model: EGMF, batch: Batch, max_new_tokens: int, grammar: Grammar | None) -> Tensor:
    """`[B, max_new_tokens]` token ids; the end token fills what follows it."""
    backbone, end = model.backbone, model.end
    embeds_BLH, _ = model.embed(PaddedLayout(batch))
    B, L, _ = embeds_BLH.shape
    device = embeds_BLH.device
    shifted_BL = torch.arange(L, device=device) - (L - batch.context_length_B[:, None])  # all rows end in one column
    seen_BS = shifted_BL >= 0
    positions_BL = shifted_BL.clamp(min=0)
    cache = backbone.new_cache()
    hidden_BLH = backbone.step(gather_positions(embeds_BLH, positions_BL), positions_BL, seen_BS, cache)
    position_B1 = batch.context_length_B[:, None]
    generated = torch.full((B, max_new_tokens), end, device=device)
    ended_B = torch.zeros(B, dtype=torch.bool, device=device)
    place_B = torch.zeros(B, dtype=torch.long, device=device)
    for step in range(max_new_tokens):
        if grammar is None:
            token_B = backbone.logits(hidden_BLH[:, -1]).argmax(-1).masked_fill(ended_B, end)
        else:
            option_BW = grammar.option_PW[place_B]
            logits_BW = backbone.token_logits(hidden_BLH[:, -1], grammar.token_m).gather(1, option_BW)
            chosen_B1 = logits_BW.masked_fill(~grammar.mask_PW[place_B], -torch.inf).argmax(-1, keepdim=True)
            token_B = grammar.token_m[option_BW.gather(1, chosen_B1)[:, 0]]
            place_B = grammar.next_PW[place_B].gather(1, chosen_B1)[:, 0]
        generated[:, step] = token_B
        ended_B |= token_B == end
        if step + 1 == max_new_tokens or (model.ranks.size == 1 and bool(ended_B.all())):
            break
        seen_BS = torch.cat([seen_BS, seen_BS.new_ones(B, 1)], 1)
        hidden_BLH = backbone.step(backbone.embed(token_B[:, None]), position_B1 + step, seen_BS, cache)
    return generated
