"""Features and text embeddings become streams of one width on one time axis.

Shapes: B samples, T time, F features of a frame, S text tokens, H hidden size of the backbone, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.batch import Features, Standardisation
from trainer.config import Modality
from trainer.models.fusion.standardise import Standardise

SHORTEST, LONGEST = 0.1, 100.0  # wavelengths of the positions, in seconds
SECONDS_PER_TOKEN = 0.3  # nominal: about 200 words a minute; text has no clock


class EncodedModality(NamedTuple):
    """An encoded modality: `values = content + position`, all 0 where the mask is False (a missing modality: everywhere).

    A tuple and no dataclass: the hooks of ZeRO-3 find tensors inside tuples only.
    """

    values_BTD: Tensor
    mask_BT: Tensor
    content_BTD: Tensor
    position_BTD: Tensor


def sinusoidal_positions(time_BT: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time [B, T, width], in float32.

        lambda_i = 0.1 s * 1000^(i / (n - 1)),   n = ceil(width / 2)
        p_t = [sin(2 pi t / lambda_0..n-1), cos(2 pi t / lambda_0..n-1)], cut to width

    Wavelengths run from 0.1 to 100 seconds in geometric steps. Source: after Vaswani et al. 2017, section 3.5.
    """
    count = (width + 1) // 2
    octaves = torch.arange(count, device=time_BT.device, dtype=torch.float32) / max(count - 1, 1)
    rate = (2.0 * math.pi / SHORTEST) * torch.exp(octaves * math.log(SHORTEST / LONGEST))
    angle_BTn = time_BT.to(torch.float32).unsqueeze(-1) * rate
    return torch.cat([angle_BTn.sin(), angle_BTn.cos()], -1)[..., :width]


class FeatureEncoder(nn.Module):
    """``LayerNorm(Linear(x)) + positions``, zeros under the mask; what was under it before is never read.

    With `standardise` x is standardised first, where there are statistics (:class:`Standardise`), in float32 before it is
    cast to the precision of the weights: features of 1e5 that differ by 1 are all the same in bfloat16.
    """

    def __init__(self, features: int, width: int, *, standardise: bool = False) -> None:
        super().__init__()
        self.standardise = Standardise(features) if standardise else None
        self.project = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values_BTF: Tensor, mask_BT: Tensor, time_BT: Tensor) -> EncodedModality:
        if self.standardise is not None:
            values_BTF = self.standardise(values_BTF)
        values_BTF = values_BTF.to(self.project.weight.dtype).masked_fill(~mask_BT.unsqueeze(-1), 0.0)
        content_BTD = self.norm(self.project(values_BTF)) * mask_BT.unsqueeze(-1)
        time_BT = time_BT.masked_fill(~mask_BT, 0.0)
        position_BTD = sinusoidal_positions(time_BT, content_BTD.shape[-1]) * mask_BT.unsqueeze(-1)
        position_BTD = position_BTD.to(content_BTD.dtype)
        return EncodedModality(content_BTD + position_BTD, mask_BT, content_BTD, position_BTD)


class Encoders(nn.Module):
    """All encoders of a run: `text`, shared by the tasks, and one per task and modality (``meld.audio``).

    Tasks that ask about the same samples share theirs: `shared` has task -> the name of their encoders, instead of its own.

    Every forward runs every encoder in one fixed order, those of the other tasks on one zero frame, so that under ZeRO
    all ranks use the same parameters in every pass; their outputs, times 0, sum to `unused_param_zero`.
    """

    def __init__(
        self,
        inputs: Mapping[str, Mapping[str, int]],
        modalities: Sequence[Modality],
        text_width: int,
        width: int,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.encoders_of = {task: (shared or {}).get(task, task) for task in inputs}
        self.modalities = tuple(modalities)
        self.inputs = {
            task: {m: widths.get(m, 0) for m in modalities if m != "text"} for task, widths in inputs.items()
        }
        if "text" in modalities:
            self.text = FeatureEncoder(text_width, width)
        self._widths = {name: self.inputs[task] for task, name in self.encoders_of.items()}
        differing = [task for task, name in self.encoders_of.items() if self.inputs[task] != self._widths[name]]
        if differing:
            raise ValueError(f"tasks of other widths than those with which they share encoders: {', '.join(differing)}")
        taken = [name for name in self._widths if hasattr(self, name) or "." in name]
        if taken:
            raise ValueError(f"task names that the fusion network cannot use: {', '.join(taken)}; rename the tasks")
        for name, widths in self._widths.items():
            self.add_module(
                name, nn.ModuleDict({m: FeatureEncoder(n, width, standardise=True) for m, n in widths.items() if n})
            )

    def standardise(self, statistics: Mapping[str, Mapping[str, Standardisation]]) -> None:
        """Standardise the features of each task and modality by these statistics; those that have none stay as they are.

        Raises:
            ValueError: statistics of another number of features.
        """
        for task, name in self.encoders_of.items():
            for modality, encoder in self.get_submodule(name).items():  # type: ignore[operator]
                encoder.standardise.use(statistics.get(task, {}).get(modality))

    def forward(
        self, task: str, text_BSH: Tensor, text_mask_BS: Tensor, features: Mapping[str, Features]
    ) -> tuple[dict[Modality, EncodedModality], Tensor]:
        """The streams of `task` by modality, and `unused_param_zero`: a scalar 0 through which the other encoders get gradients.

        Raises:
            ValueError: a task that this network was not built for, or features of another width.
        """
        self._check(task, features)
        streams: dict[Modality, EncodedModality] = {}
        unused_param_zero = text_BSH.new_zeros((), dtype=torch.float32)
        if "text" in self.modalities:
            index_S = torch.arange(text_BSH.shape[1], device=text_BSH.device, dtype=torch.float32)
            time_BS = (index_S * SECONDS_PER_TOKEN).expand(text_mask_BS.shape)
            streams["text"] = self.text(text_BSH.detach(), text_mask_BS, time_BS)
        for name, widths in self._widths.items():
            for modality, encoder in self.get_submodule(name).items():  # type: ignore[operator]
                if name == self.encoders_of[task]:
                    given = features[modality]
                    streams[modality] = encoder(given.values_BTF, given.mask_BT, given.time_BT)
                else:
                    zero = text_BSH.new_zeros(1, 1, widths[modality])
                    seen = torch.ones(1, 1, dtype=torch.bool, device=zero.device)
                    unused_param_zero = (
                        unused_param_zero + 0.0 * encoder(zero, seen, zero[..., 0]).values_BTD.float().sum()
                    )
        for modality in self.modalities:
            if modality not in streams:  # the task has no such modality: it is missing in every sample
                mask_BT = torch.zeros_like(features[modality].mask_BT)
                nothing_BTD = text_BSH.new_zeros(*mask_BT.shape, self.width)
                streams[modality] = EncodedModality(nothing_BTD, mask_BT, nothing_BTD, nothing_BTD)
        return {modality: streams[modality] for modality in self.modalities}, unused_param_zero

    def _check(self, task: str, features: Mapping[str, Features]) -> None:
        if task not in self.inputs:
            raise ValueError(f"the fusion network has no encoders for task {task!r}; it has {', '.join(self.inputs)}")
        for modality, width in self.inputs[task].items():
            given = features[modality].values_BTF.shape[-1]
            if width and given != width:
                raise ValueError(f"task {task}: {modality} has {given} features per frame; its encoder takes {width}")
