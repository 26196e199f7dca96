"""Hidden states of audio encoders in Hugging Face form, as frames of the clip.

An encoder of the wav2vec 2 family (wav2vec 2, HuBERT, WavLM, data2vec) reads samples through strided convolutions: its own frame i has its
middle at i strides and half the convolutions' reach. Whisper's encoder reads log-mel windows of 30 seconds, and its own frame i of a window
has its middle at (i + 0.5) frames.

Memory is bounded, and what a frame holds depends on the sound alone:

- wav2vec 2 family: a sound of more than 30 seconds is read in chunks of 30 seconds, each beginning 26 seconds after the one before; where two
  chunks overlap (4 seconds), each gives the half that is further from its edge, so every frame has 2 seconds of context or the sound's own end.
  The extractor normalises the whole sound before.
- Whisper: successive windows of 30 seconds (or what the model has), the last filled up with silence as the model was trained; frames of silence
  behind the sound are left out.

Shapes: n samples, N frames of the encoder, T frames, H hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.features.hub import locate_model, pretrained_options
from trainer.features.recipe import AudioEncoder
from trainer.features.timeline import average_by_time, frame_count
from trainer.features.types import Sound
from trainer.transformers_logging import quiet_transformers

CHUNK_SECONDS = 30
CONTEXT_SECONDS = 2  # on each side of what a chunk gives
UNUSED_WEIGHTS = ("masked_spec_embed",)  # for training alone


def load_audio_encoder(section: AudioEncoder, device: str) -> ConvolutionalEncoder | WhisperEncoder:
    """The encoder that a section names, in float32 on `device`.

    Raises:
        ValueError: it cannot be found, loaded or fetched, lacks weights, is no audio encoder of these forms, or has no such layer.
    """
    from transformers import AutoConfig, AutoFeatureExtractor

    folder = locate_model(section)
    try:
        config = AutoConfig.from_pretrained(**pretrained_options(folder))
        extractors: Any = AutoFeatureExtractor
        extractor = extractors.from_pretrained(**pretrained_options(folder))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"{section.name} cannot be read as an audio encoder: {error}") from error
    inputs = getattr(extractor, "model_input_names", ())
    if config.model_type == "whisper":
        kind: type[WhisperEncoder | ConvolutionalEncoder] = WhisperEncoder
    elif "input_values" in inputs and getattr(config, "conv_stride", None):
        kind = ConvolutionalEncoder
    else:
        raise ValueError(
            f"{section.name} is a model of type {config.model_type}: encoders like wav2vec 2, HuBERT and WavLM, and Whisper can be used"
        )
    if getattr(config, "add_adapter", False):
        raise ValueError(
            f"{section.name} ends in an adapter that changes its frame rate (add_adapter): it cannot be used"
        )
    return kind(section, folder, extractor, device)


class _Encoder:
    """Loads weights, and chooses layers; the frames of a sound are the subclasses' work."""

    def __init__(self, section: AudioEncoder, folder: Path, extractor: Any, device: str) -> None:
        self.layers = section.layers
        self.device = device
        self.extractor = extractor
        self.sampling_rate = int(extractor.sampling_rate)
        self.model: Any = load_weights(folder, section.name).to(device)
        self.config: Any = self.model.config
        self.width = int(self.config.hidden_size)
        self.own_rate = self._own_rate()
        self.rate = section.rate or self.own_rate
        depth = int(self.config.num_hidden_layers)
        if isinstance(self.layers, int) and not -depth - 1 <= self.layers <= depth:
            raise ValueError(
                f"layers: {self.layers} of {section.name}: it has layers 0 (what enters the first) to {depth}"
            )

    def __call__(self, sound: Sound) -> np.ndarray:
        """Features float32 [T, H] of a sound that has samples."""
        states_NH, times_N = self.own_frames(sound.samples_n)
        return average_by_time(
            states_NH, times_N, self.rate, frame_count(len(sound.samples_n), self.sampling_rate, self.rate)
        )

    def own_frames(self, samples_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's own frames [N, H] and the seconds of their middles [N]."""
        raise NotImplementedError

    def _own_rate(self) -> float:
        raise NotImplementedError

    def _states(self, encoder: Any, inputs: dict[str, Any]) -> np.ndarray:
        """The chosen hidden states of one input, float32 [N, H]; the mean of layers is over their outputs, without what enters the first."""
        import torch

        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self.layers == "last":
                chosen = encoder(**inputs).last_hidden_state
            else:
                states = encoder(**inputs, output_hidden_states=True).hidden_states
                chosen = torch.stack(states[1:]).mean(0) if self.layers == "mean" else states[self.layers]
        out_NH: np.ndarray = chosen[0].float().cpu().numpy()
        return out_NH


class ConvolutionalEncoder(_Encoder):
    """An encoder that reads samples: wav2vec 2, HuBERT, WavLM and what has their form."""

    def own_frames(self, samples_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stride, reach = self._stride, self._reach
        inputs = self.extractor(samples_n, sampling_rate=self.sampling_rate, return_tensors="np")
        values_n = np.asarray(inputs["input_values"][0], np.float32)
        if (missing := reach - len(values_n)) > 0:  # a sound shorter than one frame
            values_n = np.pad(values_n, (0, missing))
        parts = [
            self._chunk(values_n[a:b], "attention_mask" in inputs)[skip:stop]
            for a, b, skip, stop in plan_chunks(len(values_n), stride, reach, self.sampling_rate)
        ]
        states_NH = np.concatenate(parts)
        return states_NH, (np.arange(len(states_NH)) * stride + reach / 2) / self.sampling_rate

    def _chunk(self, values_n: np.ndarray, masked: bool) -> np.ndarray:
        import torch

        values_1n = torch.from_numpy(values_n)[None].to(self.device)
        inputs = {"input_values": values_1n}
        if masked:
            inputs["attention_mask"] = torch.ones_like(values_1n, dtype=torch.long)
        out_NH = self._states(self.model, inputs)
        if len(out_NH) != (expected := (len(values_n) - self._reach) // self._stride + 1):
            raise ValueError(
                f"a {self.config.model_type} encoder gave {len(out_NH)} frames where its convolutions make {expected}: it has a form that cannot "
                "be placed in time"
            )
        return out_NH

    def _own_rate(self) -> float:
        strides = [int(stride) for stride in self.config.conv_stride]
        steps = itertools.accumulate(strides[:-1], lambda a, b: a * b, initial=1)
        self._stride = math.prod(strides)
        self._reach = 1 + sum((kernel - 1) * step for kernel, step in zip(self.config.conv_kernel, steps, strict=True))
        return self.sampling_rate / self._stride


class WhisperEncoder(_Encoder):
    """Whisper's encoder, whose windows of log-mel bands have one length."""

    def own_frames(self, samples_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        window = int(self.extractor.n_samples)
        parts: list[np.ndarray] = []
        for start in range(0, len(samples_n), window):
            piece_n = samples_n[start : start + window]
            kept = math.floor(len(piece_n) / self.sampling_rate * self.own_rate + 0.5)  # whose middle is in the sound
            kept = kept if start else max(1, kept)
            if not kept:
                break
            mel = self.extractor(piece_n, sampling_rate=self.sampling_rate, return_tensors="np")["input_features"]
            features = torch.from_numpy(np.asarray(mel, np.float32)).to(self.device)
            parts.append(self._states(self.model, {"input_features": features})[:kept])
        states_NH = np.concatenate(parts)
        return states_NH, (np.arange(len(states_NH)) + 0.5) / self.own_rate

    def _own_rate(self) -> float:
        return float(self.config.max_source_positions) / float(self.extractor.chunk_length)


def plan_chunks(samples: int, stride: int, reach: int, sampling_rate: int) -> Iterator[tuple[int, int, int, int]]:
    """Chunks of a long sound: first and last sample (exclusive), and which of the chunk's own frames are kept (first, last exclusive).

    A chunk begins at a whole number of strides, so its frames are those of the whole sound. The last one is shorter, but longer than the overlap.
    """
    size = CHUNK_SECONDS * sampling_rate // stride * stride
    context = CONTEXT_SECONDS * sampling_rate // stride  # own frames
    step = size - 2 * context * stride
    for start in itertools.count(0, step):
        stop = min(samples, start + size)
        frames = (stop - start - reach) // stride + 1
        final = stop == samples
        # The next chunk begins `step` later and skips `context`: this one gives what is before that.
        yield start, stop, context if start else 0, frames if final else step // stride + context
        if final:
            return


def load_weights(folder: Path, name: str) -> Any:
    """The encoder of a folder, in float32 and evaluation mode; of a Whisper, its encoder alone.

    Raises:
        ValueError: its weights cannot be read, or lack some that the encoder has.
    """
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with quiet_transformers():
            model, about = AutoModel.from_pretrained(
                **pretrained_options(folder), dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"the weights of {name} cannot be loaded: {error}") from error
    if absent := _absent(about["missing_keys"], model):
        raise ValueError(f"{name} lacks weights, which would be random: {', '.join(absent[:5])}")
    if model.config.model_type == "whisper":
        model = model.get_encoder()
    return model.eval().requires_grad_(False)


def _absent(missing: Sequence[str], model: Any) -> list[str]:
    """The missing weights that an encoder uses."""
    whisper = model.config.model_type == "whisper"
    return sorted(
        key for key in missing if not key.endswith(UNUSED_WEIGHTS) and not (whisper and key.startswith("decoder."))
    )
