"""One sample as its user writes it, a JSON object a line: the keys of own data and of manifests of clips, and their types."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SPLIT_NAMES = {
    "train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test",
}  # fmt: skip
FOLD = "fold"  # the key of a sample's fold, unless the user names another
ANSWERS = ("label", "labels", "target")  # keys that may hold an object with the answers to several questions
_BRANCHES = ("str", "int", "float", "dict[str,any]", "list[any]")  # of a union, in the places that pydantic names
Word = str | int | None
Label = str | int | float | dict[str, Any] | list[Any] | None
Length = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None


class Line(BaseModel):
    """One sample as written."""

    model_config = ConfigDict(extra="allow")
    id: Word = None
    text: str | None = None
    label: Label = None
    target: Label = None
    audio: str | None = None
    video: str | None = None
    audio_length: Length = None
    video_length: Length = None
    split: str | None = None
    speaker: Word = None
    dialogue: Word = None
    turn: Length = None
    kind: str | None = None
    language: str | None = None
    rate: dict[Literal["audio", "video"], Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )


AnyLine = TypeVar("AnyLine", bound=Line)


def parse_line(raw: bytes, where: str, faults: list[str], form: type[AnyLine]) -> AnyLine | None:
    """The line as `form` has it; None where it is none, with every reason in `faults`."""
    try:
        return form.model_validate_json(raw)
    except ValidationError as error:
        faults += [f"{where}: {fault}" for fault in describe_errors(error)]
    return None


def describe_errors(error: ValidationError) -> list[str]:
    """What is wrong with a line, once for each key."""
    seen: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        at = ".".join(str(part) for part in fault["loc"] if part not in _BRANCHES)
        seen.setdefault(at, fault["msg"])
    return [f"{at}: {message}" if at else message for at, message in seen.items()]


def split_of(name: str) -> str | None:
    """The split that a file or key is named after: its only part that is the name of one."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None
