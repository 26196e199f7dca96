"""Samples of a request, as JSON has them, to samples as :class:`trainer.serving.predictor.Predictor` takes them; every fault with its place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data.preparation.columns import STREAMS
from trainer.serving.http.arrays import ArrayLimits, Report, read_array

KEYS = (
    "id", "text", "task", "audio", "video", "audio_length", "video_length", "rate", "speaker", "dialogue", "turn", "language",
)  # fmt: skip
LONGEST_NAME = 200  # characters of an id, a speaker, a dialogue
_LARGEST = 2**63


def check_samples(
    given: Any, tasks: Sequence[str], most: int, most_text: int, limits: ArrayLimits, report: Report
) -> list[dict[str, Any]]:
    """The samples that are right, with arrays for what stands for arrays; the faults of the others are reported.

    A sample without an id gets its place, from 0.

    Args:
        tasks: names that a sample may ask.
        most: samples of one request; `most_text`, characters of one text.
    """
    if not isinstance(given, list) or not given:
        report("samples", "must be a list of at least one sample")
        return []
    if len(given) > most:
        report("samples", f"has {len(given)} samples; at most {most} are taken at once (--max-samples)")
        return []
    out: list[dict[str, Any]] = []
    first: dict[tuple[str, Any], int] = {}
    for i, one in enumerate(given):
        where = f"samples[{i}]"
        if not isinstance(one, dict):
            report(where, "is no object")
            continue
        one = {**one, "id": str(i) if one.get("id") is None else one["id"]}
        sample = check_sample(one, where, tasks, most_text, limits, report)
        key = (str(sample.get("id")), sample.get("task"))
        if first.setdefault(key, i) != i:
            report(f"{where}.id", f"is that of samples[{first[key]}], too: answers are told apart by it")
        out.append(sample)
    return out


def check_sample(
    one: Mapping[str, Any], where: str, tasks: Sequence[str], most_text: int, limits: ArrayLimits, report: Report
) -> dict[str, Any]:
    """A sample without what is missing in it."""
    sample: dict[str, Any] = {}
    for key, value in one.items():
        if value is None:
            continue
        at = f"{where}.{key[:40]}"
        if key in STREAMS:
            array = read_array(value, key, at, limits, report)
            if array is not None:
                sample[key] = array
        elif key in ("clip", "start", "end"):
            report(at, "clips come in a multipart request, as a file: the server opens none that a request names")
        elif key not in KEYS:
            near = difflib.get_close_matches(key[:40], KEYS, n=1)
            report(
                at,
                "is no key of a sample" + (f" (did you mean {near[0]}?)" if near else f": these are {', '.join(KEYS)}"),
            )
        elif reason := _fault(key, value, tasks, most_text):
            report(at, reason)
        else:
            sample[key] = str(value) if key == "id" else value
    if not any(one.get(key) is not None for key in (*STREAMS, "text")):
        report(where, "has no text, audio or video")
    return sample


def _fault(key: str, value: Any, tasks: Sequence[str], most_text: int) -> str | None:
    """What is wrong with a value that is no array; None where nothing is."""
    if key in ("text", "task", "language"):
        if not isinstance(value, str):
            return "must be text"
        if key == "task" and value not in tasks:
            return f"{value[:40]!r} is none of the model's tasks: {', '.join(tasks)}"
        if len(value) > most_text:
            return f"has {len(value)} characters; at most {most_text} are taken (--max-text)"
    elif key in ("id", "speaker", "dialogue"):
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            return "must be text or a whole number"
        if not (value.strip() if isinstance(value, str) else True):
            return "is blank"
        if len(str(value)) > LONGEST_NAME if isinstance(value, str) else abs(value) >= _LARGEST:
            return f"is longer than {LONGEST_NAME} characters" if isinstance(value, str) else "is beyond 64 bits"
    elif key == "rate":
        return _rate_fault(value)
    else:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number"
        if not (-_LARGEST if key == "turn" else 0) <= value < _LARGEST:
            return "is out of range"
    return None


def _rate_fault(value: Any) -> str | None:
    if not isinstance(value, dict) or not set(value) <= set(STREAMS):
        return 'must be an object such as {"audio": 100, "video": 25}, frames a second'
    for name, rate in value.items():
        if (
            isinstance(rate, bool)
            or not isinstance(rate, (int, float))
            or not 0 < rate <= 1e6
            or not math.isfinite(rate)
        ):
            return f"of {name} must be a number of frames a second, more than 0 and at most a million"
    return None
