"""Small fusion networks, inputs with every pattern of what is missing, and helpers to compare passes."""

from __future__ import annotations

import itertools
import math

import torch

from trainer.batch import Features
from trainer.config import FusionConfig
from trainer.models.fusion.encoders import EncodedModality, sinusoidal_positions
from trainer.models.fusion.heads import expert_losses
from trainer.models.fusion.network import Fusion

INPUTS = {"meld": {"audio": 5, "video": 3}, "mosi": {"audio": 4, "video": 0}}
ANSWERS = {"meld": 7, "mosi": 61}
H = 12
PATTERNS = list(itertools.product([True, False], repeat=3))  # text, audio, video present


def config(**changes):
    return FusionConfig(
        **{
            "width": 8,
            "heads": 2,
            "pseudo_tokens": 3,
            "dropout": 0.0,
            "global_layers": 1,
            "expert_loss_weight": 0.5,
            **changes,
        }
    )


def fusion(seed=0, inputs=INPUTS, norm=2.5, awake=True, **changes):
    """A network whose gate and expert heads, which start even, have been moved, so that their gradients reach everything."""
    torch.manual_seed(seed)
    net = Fusion(config(**changes), inputs, H, H, norm, {task: ANSWERS.get(task, 4) for task in inputs})
    if awake:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.startswith(("gate.modality", "gate.expert", "heads.")):
                    parameter.normal_()
    return net


def lengths_mask(lengths, T):
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


def features(lengths, T, F, seed=0, rate=10.0, dtype=torch.float32):
    """Features of the given lengths with noise also where they are not valid."""
    values = torch.randn(len(lengths), T, F, generator=torch.Generator().manual_seed(seed))
    return Features(values.to(dtype), lengths_mask(lengths, T), (torch.arange(T) / rate).repeat(len(lengths), 1))


def inputs(task="meld", present=(True, True, True), B=3, T=(6, 11, 7), seed=0, dtype=torch.float32):
    """A batch of `B` samples of different lengths; `present` says what they have of text, audio and video."""
    text, audio, video = ([max(t - 2 * b, 1) * int(p) for b in range(B)] for t, p in zip(T, present, strict=True))
    words = torch.randn(B, T[0], H, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    widths = INPUTS[task]
    return (
        task,
        words,
        lengths_mask(text, T[0]),
        features(audio, T[1], widths["audio"], seed + 2, 10.0, dtype),
        features(video, T[2] if widths["video"] else 1, widths["video"], seed + 3, 5.0, dtype),
    )


def spoil(batch, value=math.nan):
    """The batch with other content, and other times, everywhere under a mask of False."""
    task, words, mask, audio, video = batch

    def worse(f):
        hidden = ~f.mask_BT
        return Features(
            f.values_BTF.masked_fill(hidden[..., None], value), f.mask_BT, f.time_BT.masked_fill(hidden, value)
        )

    return task, words.masked_fill(~mask[..., None], value), mask, worse(audio), worse(video)


def widen(batch, more=(5, 3, 9)):
    """The batch with more padding on the right, filled with noise."""
    task, words, mask, *rest = batch

    def longer(t, n, value):
        return torch.cat([t, torch.full((t.shape[0], n, *t.shape[2:]), value, dtype=t.dtype)], 1)

    def wide(f, n):
        return Features(longer(f.values_BTF, n, 7.0), longer(f.mask_BT, n, False), longer(f.time_BT, n, 3.0))

    return (
        task,
        longer(words, more[0], 5.0),
        longer(mask, more[0], False),
        wide(rest[0], more[1]),
        wide(rest[1], more[2]),
    )


def total(out):
    """A loss that every output of a fusion network is in."""
    loss = out.pseudo_BKH.float().square().sum() + out.gate_expert_BKE.square().sum() + out.unused_param_zero
    if out.expert_logprob_BEC is not None:
        answer_B = torch.arange(len(out.pseudo_BKH)) % out.expert_logprob_BEC.shape[2]
        terms = expert_losses(out.expert_logprob_BEC, answer_B, out.gate_expert_BKE, out.expert_valid_BE)
        loss = loss + sum(term.sum() for term in terms)
    return loss


def backward(net, batch):
    """Outputs and the gradients of every parameter of one pass."""
    net.zero_grad()
    out = net(*batch)
    total(out).backward()
    return out, {name: p.grad for name, p in net.named_parameters()}


def stream(mask, D=8, seed=0, rate=10.0, dtype=torch.float64):
    """An encoded stream as encoders give it: content plus position, zeros under the mask."""
    B, T = mask.shape
    content = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    position = sinusoidal_positions((torch.arange(T) / rate).expand(B, T), D).to(dtype)
    content, position = (t.masked_fill(~mask[..., None], 0.0) for t in (content, position))
    return EncodedModality(content + position, mask, content, position)


def streams(lengths, T=(6, 11, 7), D=8, seed=0, dtype=torch.float64, modalities=("text", "audio", "video")):
    """Streams of samples, `lengths` [B][3] in text, audio, video; 0 is missing."""
    rates = (1 / 0.3, 10.0, 5.0)
    return {
        m: stream(lengths_mask([sample[i] for sample in lengths], T[i]), D, seed + i, rates[i], dtype)
        for i, m in enumerate(("text", "audio", "video"))
        if m in modalities
    }
