"""Sound to features, by the recipe's section `audio`.

Shapes: n samples, T frames, F features.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from trainer.features.audio import log_mel
from trainer.features.audio.speech import SPEECH, SpeechActivity
from trainer.features.recipe import AudioEncoder, LogMel, OpenSmile
from trainer.features.timeline import average_by_time, frame_count
from trainer.features.types import ClipError, ModalityFeatures, Note, Sound

__all__ = ["AudioFeatures", "audio_features", "feature_names"]

_SMILE_MIDDLE = 0.01  # seconds from a row's start to the middle of its shorter windows
_SHORTEST_SMILE = 0.1  # seconds; a shorter sound is filled up with silence, as openSMILE's longest windows want it


class _Extractor(Protocol):
    """What makes features of a sound that has samples, without speech activity."""

    rate: float
    sampling_rate: int
    width: int

    def __call__(self, sound: Sound) -> np.ndarray: ...


class AudioFeatures:
    """What one section extracts; made once, called for every sound.

    Attributes:
        width: features of a frame.
        rate: frames a second.
        sampling_rate: that of the sound it takes, in Hz.
    """

    def __init__(self, section: LogMel | AudioEncoder | OpenSmile, device: str = "cpu") -> None:
        self.section = section
        self._extract = _extractor(section, device)
        self._speech = None if section.speech == "off" else SpeechActivity()
        self.rate = self._extract.rate
        self.sampling_rate = self._extract.sampling_rate
        self.width = self._extract.width + (section.speech == "feature")

    def __call__(self, sound: Sound) -> ModalityFeatures:
        """Features float32 [T, F] with T = max(1, round(seconds · rate)), halves upwards; frame k stands for seconds k / rate to (k + 1) / rate.

        A sound without samples is one frame that is not valid. With `speech: feature`, the last feature is the probability of speech; with
        `speech: mask`, frames in which it is below 0.5 are not valid.

        Raises:
            ClipError: the sound has samples that are not finite.
            ValueError: it is not sampled at `sampling_rate`.
        """
        if sound.sampling_rate != self.sampling_rate:
            raise ValueError(f"the sound is sampled at {sound.sampling_rate} Hz, and {self.sampling_rate} Hz is needed")
        if not len(sound.samples_n):
            note = Note("empty", "audio", "the sound has no samples")
            return ModalityFeatures(np.zeros((1, self.width), np.float32), np.zeros(1, bool), [note])
        if not np.isfinite(sound.samples_n).all():
            raise ClipError("unreadable", "the sound has samples that are not finite numbers: convert the file")
        values_TF = self._extract(sound)
        valid_T = np.ones(len(values_TF), bool)
        if self._speech is None:
            return ModalityFeatures(values_TF, valid_T)
        speech_T = self._speech.frames(sound, self.rate, len(values_TF))
        if self.section.speech == "feature":
            return ModalityFeatures(np.concatenate([values_TF, speech_T[:, None]], axis=1), valid_T)
        valid_T = speech_T >= SPEECH
        notes = [] if valid_T.any() else [Note("no speech", "audio", f"none of its {len(valid_T)} frames has speech")]
        return ModalityFeatures(np.where(valid_T[:, None], values_TF, np.float32(0)), valid_T, notes)


def audio_features(section: LogMel | AudioEncoder | OpenSmile, device: str = "cpu") -> AudioFeatures:
    """What the section extracts, with its weights loaded onto `device`.

    Raises:
        ValueError: a package or the encoder's files are missing, or the encoder has another form; the message says what to do.
    """
    return AudioFeatures(section, device)


def feature_names(section: LogMel | OpenSmile) -> tuple[str, ...]:
    """The names of the features, in their order; an encoder's have none.

    Raises:
        ValueError: opensmile is needed and not installed.
    """
    if isinstance(section, LogMel):
        return log_mel.feature_names(section)
    return (*_Smile(section).names, *["speech"] * (section.speech == "feature"))


def _extractor(section: LogMel | AudioEncoder | OpenSmile, device: str) -> _Extractor:
    if isinstance(section, LogMel):
        return log_mel.LogMelFeatures(section)
    if isinstance(section, OpenSmile):
        return _Smile(section)
    from trainer.features.audio.encoder import load_audio_encoder

    return load_audio_encoder(section, device)


class _Smile:
    """Low-level descriptors of openSMILE, 100 rows a second; the mean of the rows whose middle is in a frame.

    A row's descriptors are of 20 ms from its start, and of 60 ms (pitch and what is measured with it); its middle is that of the 20 ms.
    """

    sampling_rate = 16000

    def __init__(self, section: OpenSmile) -> None:
        opensmile = _opensmile()
        self.rate = section.rate
        self._smile = opensmile.Smile(
            feature_set=opensmile.FeatureSet[section.set], feature_level=opensmile.FeatureLevel.LowLevelDescriptors
        )
        self.names: tuple[str, ...] = tuple(self._smile.feature_names)
        self.width = len(self.names)

    def __call__(self, sound: Sound) -> np.ndarray:
        samples_n = np.clip(sound.samples_n, -1, 32767 / 32768)  # openSMILE reads 16 bits; 1.0 would become -32768
        count = frame_count(len(samples_n), self.sampling_rate, self.rate)
        if (missing := round(_SHORTEST_SMILE * self.sampling_rate) - len(samples_n)) > 0:
            samples_n = np.pad(samples_n, (0, missing))
        table = self._smile.process_signal(samples_n, self.sampling_rate)
        times_N = table.index.get_level_values("start").total_seconds().to_numpy() + _SMILE_MIDDLE
        return average_by_time(table.to_numpy(np.float32), times_N, self.rate, count)


def _opensmile() -> Any:
    try:
        import opensmile
    except ImportError as error:
        raise ValueError(
            "openSMILE's sets need the package opensmile, which is not installed: pip install 'egmf-trainer[opensmile]'. Its licence is for "
            "research only; commercial use must be bought from audEERING"
        ) from error
    return opensmile
