"""Speech activity of a sound by silero-vad, whose wheel carries the weights.

Shapes: n samples, W windows, T frames.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from trainer.features.timeline import average_by_time
from trainer.features.types import Sound

SAMPLING_RATE = 16000
WINDOW = 512  # samples, 32 ms
SPEECH = 0.5  # the least probability of a frame that counts as speech


def weights_file() -> Path:
    """The TorchScript file of the installed silero-vad. The package is not imported: it would set torch's number of threads.

    Raises:
        ValueError: silero-vad is not installed, or does not carry the file.
    """
    found = importlib.util.find_spec("silero_vad")
    if found is None or not found.submodule_search_locations:
        raise ValueError("speech activity needs silero-vad, which is not installed: pip install 'egmf-trainer[clips]'")
    path = Path(found.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    if not path.is_file():
        raise ValueError(f"the installed silero-vad lacks {path}: pip install 'silero-vad>=6.0'")
    return path


class SpeechActivity:
    """The probability that somebody speaks, from window to window with the model's state carried on."""

    def __init__(self) -> None:
        import torch

        self._model: Any = torch.jit.load(str(weights_file()), map_location="cpu").eval()  # type: ignore[no-untyped-call]

    def windows(self, sound: Sound) -> np.ndarray:
        """One probability for every 32 ms of the sound, the last one filled up with silence; float32 [W]."""
        import torch

        samples_n = _at_16_khz(sound)
        padded_n = np.zeros(math.ceil(len(samples_n) / WINDOW) * WINDOW, np.float32)
        padded_n[: len(samples_n)] = samples_n
        with torch.inference_mode():
            self._model.reset_states()
            found = [
                float(self._model(window, SAMPLING_RATE)) for window in torch.from_numpy(padded_n).reshape(-1, WINDOW)
            ]
        return np.array(found, np.float32)

    def frames(self, sound: Sound, rate: float, count: int) -> np.ndarray:
        """The mean of the windows whose middle is in each frame, else of the nearest one; float32 [T]."""
        probabilities_W = self.windows(sound)
        times_W = (np.arange(len(probabilities_W)) + 0.5) * WINDOW / SAMPLING_RATE
        return average_by_time(probabilities_W[:, None], times_W, rate, count)[:, 0]


def _at_16_khz(sound: Sound) -> np.ndarray:
    """The samples at 16 kHz, by scipy's polyphase filter where the sound has another rate."""
    if sound.sampling_rate == SAMPLING_RATE:
        return sound.samples_n
    from scipy.signal import resample_poly

    shared = math.gcd(SAMPLING_RATE, sound.sampling_rate)
    resampled: np.ndarray = resample_poly(sound.samples_n, SAMPLING_RATE // shared, sound.sampling_rate // shared)
    return resampled.astype(np.float32)
