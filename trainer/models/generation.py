"""Free generation: the most likely text after each context, token by token.

Shapes: B rows, L positions, S positions seen so far, H backbone hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.models.egmf import EGMF
from trainer.models.layouts import PaddedLayout, gather_positions


@torch.no_grad()
def generate(model: EGMF, batch: Batch, max_new_tokens: int) -> list[str]:
    """The texts that greedy decoding gives, without their end tokens and otherwise as decoded.

    Dropout is off. With several processes every one makes all `max_new_tokens` steps (ZeRO-3 needs equal calls).
    """
    was_training = model.training
    model.eval()
    try:
        token_ids = _decode(model, batch, max_new_tokens).tolist()
    finally:
        model.train(was_training)
    kept = [row[: row.index(model.end)] if model.end in row else row for row in token_ids]
    return [str(model.backbone.tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in kept]


def _decode(model: EGMF, batch: Batch, max_new_tokens: int) -> Tensor:
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
    for step in range(max_new_tokens):
        token_B = backbone.logits(hidden_BLH[:, -1]).argmax(-1).masked_fill(ended_B, end)
        generated[:, step] = token_B
        ended_B |= token_B == end
        if step + 1 == max_new_tokens or (model.ranks.size == 1 and bool(ended_B.all())):
            break
        seen_BS = torch.cat([seen_BS, seen_BS.new_ones(B, 1)], 1)
        hidden_BLH = backbone.step(backbone.embed(token_B[:, None]), position_B1 + step, seen_BS, cache)
    return generated
