"""The fusion network over the samples of a batch, group by group: a group is padded to its own longest sample.

Shapes: B samples of a batch, S text tokens, H hidden size of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.batch import FusionInput
from trainer.models.fusion.network import Fusion, FusionOutput


def fuse_groups(
    fusion: Fusion, embed: Callable[[Tensor], Tensor], task: str, groups: Sequence[FusionInput]
) -> FusionOutput:
    """The pseudo tokens of all samples, in order.

    Dummy groups pass through too and count for nothing: `unused_param_zero` holds their outputs times 0.

    Args:
        embed: token ids to the backbone's input embeddings, which enter without a gradient.
    """
    outputs = [
        fusion(task, embed(group.text_ids_BS).detach(), group.text_mask_BS, group.audio, group.video)
        for group in groups
    ]
    used = [out for out, group in zip(outputs, groups, strict=True) if not group.dummy]
    zero = torch.stack([out.unused_param_zero.float() for out in used]).sum()
    for out, group in zip(outputs, groups, strict=True):
        if group.dummy:
            zero = zero + 0.0 * (out.pseudo_BKH.float().sum() + out.unused_param_zero.float())
            if out.expert_logprob_BEC is not None:
                zero = zero + 0.0 * out.expert_logprob_BEC.sum()
    if len(used) == 1:
        return used[0]._replace(unused_param_zero=zero)
    logprobs = [out.expert_logprob_BEC for out in used if out.expert_logprob_BEC is not None]
    return FusionOutput(
        torch.cat([out.pseudo_BKH for out in used]),
        torch.cat([out.gate_expert_BKE for out in used]),
        torch.cat([out.gate_modality_BKEM for out in used]),
        zero,
        torch.cat([out.expert_valid_BE for out in used]),
        torch.cat(logprobs) if logprobs else None,
    )
