"""Speech to text by a Whisper of Hugging Face form: greedy, so the same sound gives the same words.

Whisper reads windows of 30 seconds; in a longer sound, each window begins where the last finished segment ended (transformers' own long-form
algorithm). Sound of more than ten minutes is read in pieces of ten minutes, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.features.hub import locate_model, pretrained_options
from trainer.features.recipe import Transcribed
from trainer.features.types import Sound, Word
from trainer.transformers_logging import quiet_transformers

PIECE_SECONDS = 600
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my"})  # written without spaces: each character counts as a word


class Transcriber:
    """The Whisper that a section names, loaded once; called for every sound.

    Words have times from the model's cross-attention where the checkpoint says which of its heads align (`alignment_heads` in
    generation_config.json, as OpenAI's have). Where it does not, a segment's words share its time in proportion to their letters. Languages
    that are written without spaces have a word a character.

    Attributes:
        sampling_rate: that of the sound it takes, in Hz.
    """

    def __init__(self, section: Transcribed, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ValueError: it cannot be found, loaded or fetched, is no Whisper, or does not know the language.
        """
        from pickle import UnpicklingError

        import torch
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

        folder = locate_model(section)
        options = pretrained_options(folder)
        try:
            config = AutoConfig.from_pretrained(**options)
            if config.model_type != "whisper":
                raise ValueError(f"it is a model of type {config.model_type}, and a Whisper is needed")
            extractor: Any = AutoFeatureExtractor
            self._extractor = extractor.from_pretrained(**options)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(**options)
            whisper: Any = WhisperForConditionalGeneration
            with quiet_transformers():
                model, about = whisper.from_pretrained(**options, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"{section.name} cannot transcribe: {error}") from error
        if absent := sorted(about["missing_keys"]):
            raise ValueError(f"{section.name} lacks weights, which would be random: {', '.join(absent[:5])}")
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._device = device
        self._aligns = bool(getattr(model.generation_config, "alignment_heads", None))
        self._spoken = _language(model.generation_config, section)
        self._languages: dict[str, int] = getattr(model.generation_config, "lang_to_id", None) or {}
        self.sampling_rate = int(self._extractor.sampling_rate)

    def __call__(self, sound: Sound) -> tuple[str, tuple[Word, ...]]:
        """What is said, and its words with their seconds; ("", ()) where nothing is.

        Raises:
            ValueError: the sound is not sampled at `sampling_rate`.
        """
        if sound.sampling_rate != self.sampling_rate:
            raise ValueError(f"the sound is sampled at {sound.sampling_rate} Hz, and {self.sampling_rate} Hz is needed")
        size = PIECE_SECONDS * self.sampling_rate
        texts: list[str] = []
        words: list[Word] = []
        for start in range(0, len(sound.samples_n), size):
            piece_n = sound.samples_n[start : start + size]
            offset, seconds = start / self.sampling_rate, len(piece_n) / self.sampling_rate
            for segment in self._segments(piece_n):
                text = self._tokenizer.decode(segment["tokens"], skip_special_tokens=True)
                language = self._language_of(segment)
                if self._aligns:
                    found = self._aligned(segment, language, seconds)
                else:
                    begin, end = (min(float(segment[key]), seconds) for key in ("start", "end"))
                    found = spread(list(text) if language in UNSPACED else text.split(), begin, end)
                words += [Word(word, offset + a, offset + b) for word, a, b in found]
                texts.append(text.strip())
        return " ".join(text for text in texts if text), tuple(words)

    def _segments(self, samples_n: np.ndarray) -> Sequence[dict[str, Any]]:
        """Segments of Whisper's own making: token ids, start and end in seconds, and times of tokens where heads align."""
        import torch

        long = len(samples_n) > self._extractor.n_samples
        inputs = self._extractor(
            samples_n,
            sampling_rate=self.sampling_rate,
            return_tensors="pt",
            return_attention_mask=True,
            truncation=not long,
            padding="longest" if long else "max_length",
        ).to(self._device)
        with torch.inference_mode(), quiet_transformers():
            out = self._model.generate(
                inputs["input_features"],
                attention_mask=inputs["attention_mask"],
                return_timestamps=True,
                return_segments=True,
                return_token_timestamps=self._aligns or None,
                do_sample=False,
                num_beams=1,
                condition_on_prev_tokens=False,
                **self._spoken,
            )
        segments: Sequence[dict[str, Any]] = out["segments"][0]
        return segments

    def _language_of(self, segment: dict[str, Any]) -> str | None:
        """The language, such as en, that the model was told or found; None for a model of English alone."""
        result = segment["result"]
        tokens = set((result["sequences"] if isinstance(result, dict) else result).tolist())
        return next((name.strip("<|>") for name, token in self._languages.items() if token in tokens), None)

    def _aligned(
        self, segment: dict[str, Any], language: str | None, seconds: float
    ) -> Iterator[tuple[str, float, float]]:
        """A segment's words with times from cross-attention: each ends where its last token does, and begins where the token before ended."""
        from transformers.models.whisper.tokenization_whisper import LANGUAGES, _combine_tokens_into_words

        ends = [min(float(time), seconds) for time in segment["token_timestamps"]]
        special = self._tokenizer.eos_token_id  # text comes before it, control tokens and time stamps after
        spoken = [i for i, token in enumerate(segment["tokens"].tolist()) if token < special]
        tokens = [int(segment["tokens"][i]) for i in spoken]
        words, _, places = _combine_tokens_into_words(self._tokenizer, tokens, LANGUAGES.get(language or "en"))
        for word, inside in zip(words, places, strict=True):
            if text := word.strip():
                first, last = spoken[inside[0]], spoken[inside[-1]]
                begin = ends[first - 1] if first else ends[first]
                yield text, min(begin, ends[last]), ends[last]


def spread(words: Sequence[str], start: float, end: float) -> Iterator[tuple[str, float, float]]:
    """Words with the seconds from `start` to `end` shared out in proportion to their letters."""
    words = [word for word in words if word.strip()]
    letters = sum(map(len, words))
    done = 0
    for word in words:
        begin = start + (end - start) * done / letters
        done += len(word)
        yield word, begin, start + (end - start) * done / letters


def _language(settings: Any, section: Transcribed) -> dict[str, str]:
    """What is passed for language and task; an English-only Whisper takes neither."""
    if not hasattr(settings, "no_timestamps_token_id"):
        raise ValueError(
            f"{section.name} has no no_timestamps_token_id in generation_config.json: it is too old, or no complete Whisper. Fetch it again"
        )
    if not getattr(settings, "is_multilingual", hasattr(settings, "lang_to_id")):
        if section.language not in (None, "en"):
            raise ValueError(f"text.language: {section.language}, and {section.name} knows English alone")
        return {}
    known = sorted(token.strip("<|>") for token in getattr(settings, "lang_to_id", {}))
    if section.language is None:
        return {"task": "transcribe"}
    if section.language not in known:
        raise ValueError(f"text.language: {section.name} does not know {section.language}; it knows {', '.join(known)}")
    return {"task": "transcribe", "language": section.language}
