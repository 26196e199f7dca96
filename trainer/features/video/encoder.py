"""Hugging Face encoders of pictures (CLIP, DINOv2, ViT) and of windows of pictures (VideoMAE, TimeSformer, ViViT).

Shapes: B pictures or windows of a batch, N pictures of a window, C = 3 colours, H height and W width of a picture, D width of the encoder, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.features.hub import locate_model, pretrained_options
from trainer.features.recipe import VideoEncoder
from trainer.transformers_logging import quiet_transformers

# Encoders of windows whose first token is a patch like the others, so that it says nothing of the whole.
_WITHOUT_FIRST_TOKEN = ("videomae",)


class VisionEncoder:
    """An encoder and its image processor in the form that needs no torchvision, in float32.

    `pooling` is `pooled` for the pooled output, or the first token where the weights have none, and `mean` for the mean of all tokens of the last
    hidden state. Of a model with a vision tower beside others (CLIP, SigLIP) only the tower is loaded.

    Attributes:
        width: numbers of a feature frame.
        window: pictures of a window; None for an encoder of single pictures.
        batch: pictures or windows that are encoded at a time.

    Raises:
        ValueError: there is no such encoder, it is none of pictures, or its weights lack a part that is needed.
    """

    def __init__(self, section: VideoEncoder, device: str) -> None:
        name, pooling = section.name, section.pooling
        self._device, self._pooling, self._name = torch.device(device), pooling, name
        folder = locate_model(section)  # what is hashed is what is loaded
        with quiet_transformers():
            self._processor = _processor(name, folder)
            model, self._has_pooler = _model(name, folder)
        self._model = model.to(self._device).eval()
        config = model.config
        self.window: int | None = getattr(config, "num_frames", None)
        self.batch = 8 if self.window is None else 2
        self.width = int(getattr(config, "hidden_size", None) or config.hidden_sizes[-1])
        if pooling == "pooled" and config.model_type in _WITHOUT_FIRST_TOKEN:
            raise ValueError(f"video.pooling: {name} has no pooled output and no token for it: use pooling: mean")

    def prepare(self, rgb_HW3: np.ndarray) -> torch.Tensor:
        """A picture as the encoder's processor resizes, crops and normalises it: float32 [C, H, W]."""
        pixels: torch.Tensor = self._processor([rgb_HW3], return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
        return pixels.reshape(pixels.shape[-3:]).float()  # of a video's processor it has one more axis

    def __call__(self, items: Sequence[torch.Tensor]) -> np.ndarray:
        """Features [n, D] of at most `batch` prepared pictures [C, H, W], or windows [N, C, H, W].

        Always as many as `batch` are computed, the rest of them zeros: kernels for another size round otherwise.
        """
        filled = [*items, *(torch.zeros_like(items[0]) for _ in range(self.batch - len(items)))]
        tf32_off = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), tf32_off:
            output = self._model(pixel_values=torch.stack(filled).to(self._device))
            features_BD = self._pool(output)[: len(items)]
        return features_BD.float().cpu().numpy()

    def _pool(self, output: Any) -> torch.Tensor:
        tokens: torch.Tensor = output.last_hidden_state
        if tokens.ndim == 4:  # a convolutional network's [B, D, H, W]
            tokens = tokens.flatten(2).transpose(1, 2)
        if self._pooling == "mean":
            return tokens.mean(dim=1)
        pooled: torch.Tensor | None = getattr(output, "pooler_output", None) if self._has_pooler else None
        return tokens[:, 0] if pooled is None else pooled.flatten(1)


def _processor(name: str, folder: Path) -> Any:
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor  # it has no types
    try:
        return auto.from_pretrained(**pretrained_options(folder), backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"video.name: the image processor of {name} cannot be loaded: {error}") from error


def _model(name: str, folder: Path) -> tuple[Any, bool]:
    """The encoder, and whether its pooled output comes from weights that were trained.

    A checkpoint of another head often has no pooler; transformers fills it with random numbers, which must not become features.
    """
    from transformers import AutoConfig, AutoModel

    try:
        whole = AutoConfig.from_pretrained(**pretrained_options(folder))
        config = getattr(whole, "vision_config", whole)
        model, loading = AutoModel.from_pretrained(
            **pretrained_options(folder), config=config, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"video.name: {name} cannot be loaded as a vision encoder: {error}") from error
    if model.main_input_name != "pixel_values":
        raise ValueError(f"video.name: {name} is a {config.model_type}, which is no encoder of pictures")
    missing = sorted(loading["missing_keys"])
    needed = [key for key in missing if "pooler" not in key]
    if needed:
        raise ValueError(
            f"video.name: the weights of {name} lack {len(needed)} tensors of {type(model).__name__}, such as {needed[0]}"
        )
    return model, not missing
