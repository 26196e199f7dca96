"""From the bytes of a request to what is asked: checked samples, a clip that is to be extracted, and what the answer is to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from trainer.data.preparation.columns import STREAMS
from trainer.serving.http.arrays import ArrayLimits, npy_arrays, npz_arrays
from trainer.serving.http.faults import Fault, RefusedError
from trainer.serving.http.form import FILES, Form, read_form
from trainer.serving.http.limits import Limits
from trainer.serving.http.sample_check import check_sample, check_samples

FIELDS = ("id", "text", "task", "audio_length", "video_length", "speaker", "dialogue", "turn", "language")
SPAN = ("start", "end")
RATES = {"audio_rate": "audio", "video_rate": "video"}
OPTIONS = ("probabilities", "gates")
LONGEST_SECONDS = 1e6
WIDEST = 8192  # features of a frame of a stream that the model does not read
_BRACKETS = 64  # objects and lists of a sample beside its frames


@dataclass(frozen=True)
class ClipFile:
    """A clip that a request brought: its bytes and the seconds of it that are meant."""

    content: bytes
    start: float | None
    end: float | None


@dataclass
class Asked:
    """What a request asks."""

    samples: list[dict[str, Any]]
    probabilities: bool = False
    gates: bool = False
    clip: ClipFile | None = None  # of the only sample


@dataclass(frozen=True)
class Asking:
    """Reads requests for a model.

    Args:
        tasks: names that a sample may ask.
        width: the widest features that the model reads.
        clips: why clips are not taken; None where they are.
    """

    limits: Limits
    tasks: Sequence[str] = field(default_factory=tuple)
    width: int = 0
    clips: str | None = "the model has no recipe for clips"

    def of_json(self, body: bytes | bytearray, hold: Callable[[int], None]) -> Asked:
        """Raises RefusedError with all faults."""
        brackets = body.count(b"[") + body.count(b"{")
        if brackets > (most := self.limits.max_samples * (2 * self.limits.max_frames + _BRACKETS)):
            raise RefusedError(413, "too_large", f"the JSON has more than {most} lists and objects")
        try:
            given = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RefusedError(400, "bad_json", f"the body is no JSON that can be read: {error}") from error
        faults: list[Fault] = []

        def report(where: str, reason: str) -> None:
            faults.append(Fault(where, reason))

        if not isinstance(given, dict):
            raise RefusedError(
                422, "bad_request", 'the body must be a JSON object such as {"samples": [{"text": "…"}]}'
            )
        for key in given:
            if key not in ("samples", "options"):
                report(key[:40], "is no key of a request: these are samples and options")
        options = _options(given.get("options"), report)
        limits = ArrayLimits(self.limits.max_frames, max(self.width, WIDEST), hold)
        samples = check_samples(
            given.get("samples"), self.tasks, self.limits.max_samples, self.limits.max_text, limits, report
        )
        _refuse(faults)
        return Asked(samples, options.get("probabilities", False), options.get("gates", False))

    def of_form(self, body: bytes, content_type: str, hold: Callable[[int], None]) -> Asked:
        """Raises RefusedError with all faults."""
        form = read_form(body, content_type)
        faults: list[Fault] = []

        def report(where: str, reason: str) -> None:
            faults.append(Fault(where, reason))

        _known_parts(form, report)
        given: dict[str, Any] = {key: form.fields[key] for key in FIELDS if form.fields.get(key, "").strip()}
        for key in ("audio_length", "video_length", "turn"):
            if key in given:
                given[key] = _whole(given[key])
        rates = {name: _number(form.fields[key]) for key, name in RATES.items() if form.fields.get(key, "").strip()}
        if rates:
            given["rate"] = rates
        limits = ArrayLimits(self.limits.max_frames, max(self.width, WIDEST), hold)
        arrays = _arrays(form, limits, report)
        clip = self._clip(form, bool(arrays), report)
        bare = clip is not None or arrays or "text" in given
        sample = check_sample(
            {"id": "0", **given, **({} if "text" in given else {"text": ""})},
            "form",
            self.tasks,
            self.limits.max_text,
            limits,
            report,
        )
        if not bare and not faults:
            report("form", "has no text, no clip and no features")
        if not sample.get("text"):
            sample.pop("text", None)
        options = {name: _flag(name, form.fields.get(name, ""), report) for name in OPTIONS}
        _refuse(faults)
        return Asked([{**sample, **arrays}], options["probabilities"], options["gates"], clip)

    def _clip(self, form: Form, arrays: bool, report: Callable[[str, str], None]) -> ClipFile | None:
        start, end = (_seconds(key, form.fields.get(key, "").strip(), report) for key in SPAN)
        if end is not None and (start or 0.0) >= end:
            report("start", f"({start or 0:g}) is not before end ({end:g})")
        if "clip" not in form.files:
            return None
        if self.clips is not None:
            report("clip", f"clips are not taken: {self.clips}")
        elif arrays:
            report("clip", "stands beside features: give one of them")
        elif not form.files["clip"]:
            report("clip", "is an empty file")
        return ClipFile(form.files["clip"], start, end)


def _seconds(key: str, text: str, report: Callable[[str, str], None]) -> float | None:
    found = _number(text) if text else None
    if text and not (isinstance(found, float) and 0 <= found <= LONGEST_SECONDS):
        report(key, f"must be a number of seconds, from 0 to {LONGEST_SECONDS:g}")
        return None
    return found


def _options(given: Any, report: Callable[[str, str], None]) -> dict[str, bool]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        report("options", f"must be an object with {' and '.join(OPTIONS)}, true or false")
        return {}
    out = {}
    for key, value in given.items():
        if key not in OPTIONS:
            report(f"options.{key[:40]}", f"is no option: these are {' and '.join(OPTIONS)}")
        elif not isinstance(value, bool):
            report(f"options.{key}", "must be true or false")
        else:
            out[key] = value
    return out


def _known_parts(form: Form, report: Callable[[str, str], None]) -> None:
    for name in form.fields:
        if name not in (*FIELDS, *SPAN, *RATES, *OPTIONS):
            report(name[:40], f"is no field of a request: these are {', '.join((*FIELDS, *SPAN, *RATES, *OPTIONS))}")
    for name in form.files:
        if name not in FILES:
            report(name[:40], f"is no file of a request: these are {', '.join(FILES)}")


def _arrays(form: Form, limits: ArrayLimits, report: Callable[[str, str], None]) -> dict[str, Any]:
    """The feature files of a form: `features` is an npz with audio, video or both, `audio` and `video` are npy or npz."""
    found: dict[str, Any] = {}
    if form.files.get("features"):
        found |= npz_arrays(form.files["features"], STREAMS, "features", limits, report)
    for name in STREAMS:
        if content := form.files.get(name):
            if name in found:
                report(name, "is in features, too: give one of them")
            read = npz_arrays if content[:2] == b"PK" else npy_arrays
            found |= read(content, (name,), name, limits, report)
    return found


def _flag(name: str, text: str, report: Callable[[str, str], None]) -> bool:
    if text.strip().lower() not in ("", "true", "false"):
        report(name, "must be true or false")
    return text.strip().lower() == "true"


def _whole(text: str) -> Any:
    """A whole number where the text is one, else the text, for the checks to name."""
    plain = text.strip()
    return (
        int(plain)
        if len(plain) <= 20 and plain.removeprefix("-").isascii() and plain.removeprefix("-").isdecimal()
        else text
    )


def _number(text: str) -> Any:
    try:
        return float(text[:40])
    except ValueError:
        return text


def _refuse(faults: Sequence[Fault]) -> None:
    if faults:
        many = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
        raise RefusedError(422, "bad_samples", f"the request has {many}", faults)


def refuse_rejected(rejected: Mapping[str, Sequence[str]]) -> None:
    """Raise RefusedError for samples that the model cannot read: place -> reasons."""
    _refuse([Fault(where, reason) for where, reasons in rejected.items() for reason in reasons])
