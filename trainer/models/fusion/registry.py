"""Experts by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from trainer.models.fusion.expert import Expert

E = TypeVar("E", bound=type[Expert])
NAME = re.compile(r"[a-z][a-z0-9_]*")  # it is part of names of weights and metrics

_experts: dict[str, type[Expert]] = {}


def register_expert(name: str) -> Callable[[E], E]:
    """Class decorator: `model.fusion.experts` may name this class `name` from now on.

    Raises:
        ValueError: the name is taken by another class, or holds more than lower-case letters, digits and underscores.
    """

    def register(cls: E) -> E:
        if not NAME.fullmatch(name):
            raise ValueError(f"the name of an expert is lower-case letters, digits and underscores, not {name!r}")
        if name in _experts and _experts[name] is not cls:
            raise ValueError(f"two experts are named {name!r}: {_experts[name].__module__} has one already")
        _experts[name] = cls
        return cls

    return register


def registered_experts() -> dict[str, type[Expert]]:
    """Name -> class of all that have been registered so far."""
    return dict(_experts)
