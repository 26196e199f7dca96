"""Dotted keys of a pydantic schema: their fields, what a change of them affects, and the nearest valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic_core import ErrorDetails

T = TypeVar("T")
AFFECTS = "affects"  # the entry of a field's json_schema_extra that :func:`find` reads
# What a change of a field affects, marked at the field (or at a section, for all that it holds). Unmarked: what is trained.
Effect = Literal["training", "selection", "execution", "scoring", "record"]
EXECUTION: Final[dict[str, JsonValue]] = {AFFECTS: "execution"}  # speed, memory, places and logs; not the results
SELECTION: Final[dict[str, JsonValue]] = {AFFECTS: "selection"}  # which checkpoint is chosen, or when a run gives up
SCORING: Final[dict[str, JsonValue]] = {AFFECTS: "scoring"}  # how the trained weights are evaluated
RECORD: Final[dict[str, JsonValue]] = {AFFECTS: "record"}  # where and how the run is recorded


@dataclass(frozen=True)
class Place:
    """Where a dotted key lies: the fields down to it, what follows inside a field that is a dictionary, and what it affects."""

    fields: tuple[str, ...]
    rest: str
    annotation: Any
    affects: Effect  # as marked at the field, or at the innermost section around it; training where nothing is marked


def find(model: type[BaseModel], key: str) -> Place | None:
    """The place of a dotted key in `model`; None where there is no such field."""
    current: Any = model
    fields: list[str] = []
    affects: Effect = "training"
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not _is_section(current):
            rest, holder = ".".join(parts[depth:]), _dictionary(current)
            return None if holder is None else Place(tuple(fields), rest, holder, affects)
        field = current.model_fields.get(part)
        if field is None:
            return None
        extra = field.json_schema_extra
        affects = cast(Effect, extra[AFFECTS]) if isinstance(extra, dict) and AFFECTS in extra else affects
        fields.append(part)
        current = field.annotation
    return Place(tuple(fields), "", current, affects)


def is_text(model: type[BaseModel], key: str) -> bool:
    """Whether a dotted key of `model` holds text (or nothing) and no other type."""
    place = find(model, key)
    if place is None:
        return False
    held = get_args(place.annotation)[1] if place.rest else place.annotation
    types = set(get_args(held)) if get_origin(held) in (Union, UnionType) else {held}
    return types - {type(None)} == {str}


def dotted(raw: dict[str, Any]) -> dict[str, Any]:
    """A nested dictionary flat: dotted key -> value; lists and empty dictionaries stay values."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield prefix, value

    return dict(walk("", raw))


def defaults_of_missing(saved: Iterable[str], defaults: Mapping[str, T]) -> dict[str, T]:
    """The defaults of dotted keys that another version, which saved these, did not know."""
    keys = set(saved)
    return {
        key: default
        for key, default in defaults.items()
        if key not in keys and not any(name.startswith(f"{key}.") for name in keys)  # of a dictionary that is not empty
    }


def nest(model: type[BaseModel], flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dotted keys as the nested dictionary that `model` validates, and those that it has no field for, still dotted."""
    nested: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in flat.items():
        place = find(model, key)
        if place is None:
            unknown[key] = value
            continue
        inside: list[str] = []
        if place.rest:  # only a dictionary of Any is nested again; the keys of others may hold dots
            inside = place.rest.split(".") if get_args(place.annotation)[1] is Any else [place.rest]
        *above, last = [*place.fields, *inside]
        holder = nested
        for name in above:
            holder = holder.setdefault(name, {})
        holder[last] = value
    return nested, unknown


def describe(fault: ErrorDetails, model: type[BaseModel]) -> str:
    """One validation error in words, with its dotted key and the nearest valid name or word."""
    loc = [str(part) for part in fault["loc"]]
    key = ".".join(loc) or "(top level)"
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(loc[-1], _field_names(model, loc[:-1]))}"
    if fault["type"] == "missing":
        return f"{key}: missing"
    if fault["type"] == "value_error":
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}"
    given = fault.get("input")
    but = f", not {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    near = nearest(given, _expected(fault)) if isinstance(given, str) and fault["type"] == "literal_error" else ""
    return f"{key}: {fault['msg'].replace('Input should', 'must', 1)}{but}{near}"


def nearest(name: str, names: Sequence[str]) -> str:
    """A hint for a message: the nearest of `names`, or all of them where none is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else (f"; known: {', '.join(names)}" if names else "")


def _expected(fault: ErrorDetails) -> list[str]:
    """The allowed words of a `literal_error`, from its text ("'a', 'b' or 'c'")."""
    return [word.strip(" '") for word in str(fault["ctx"]["expected"]).replace(" or ", ",").split(",")]


def _field_names(model: type[BaseModel], loc: Sequence[str]) -> list[str]:
    current: Any = model
    for part in loc:
        if not _is_section(current) or part not in current.model_fields:
            return []
        current = current.model_fields[part].annotation
    return list(current.model_fields) if _is_section(current) else []


def _dictionary(annotation: Any) -> Any:
    """The dictionary type that `annotation` is, or that is one of its alternatives; None where there is none."""
    union = get_origin(annotation) in (Union, UnionType)
    return next((one for one in (get_args(annotation) if union else [annotation]) if get_origin(one) is dict), None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
