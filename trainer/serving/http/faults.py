"""How a request is refused: a status, a code for programs, a message for people, and every fault with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SHOWN = 100  # faults of one request that are listed
LONGEST = 500  # characters of a reason


class Fault(NamedTuple):
    """What is wrong, and where in the request: `samples[3].audio[7]`."""

    where: str
    reason: str


class RefusedError(Exception):
    """A request that is refused; see :func:`error_body` for what its client gets."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        faults: Sequence[Fault] = (),
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.faults, self.headers = list(faults), dict(headers or {})

    def body(self) -> dict[str, Any]:
        return error_body(self.code, self.message, self.faults)


def error_body(code: str, message: str, faults: Sequence[Fault] = ()) -> dict[str, Any]:
    """`{"error": {"code", "message", "faults": [{"where", "reason"}, …]}}`; of very many faults the first ones."""
    shown = [{"where": one.where, "reason": _printable(one.reason[:LONGEST])} for one in faults[:SHOWN]]
    if len(faults) > SHOWN:
        message = f"{message} (the first {SHOWN} are listed)"
    return {"error": {"code": code, "message": _printable(message), "faults": shown}}


def busy(code: str, message: str, seconds: int = 1) -> RefusedError:
    """Too much is asked of the server at the moment: 429, and when to ask again."""
    return RefusedError(429, code, message, headers={"Retry-After": str(max(1, seconds))})


def unavailable(code: str, message: str, seconds: int = 5) -> RefusedError:
    """The server cannot answer yet, or any more: 503, and when to ask again."""
    return RefusedError(503, code, message, headers={"Retry-After": str(seconds)})


def too_large(message: str) -> RefusedError:
    return RefusedError(413, "too_large", message)


def _printable(text: str) -> str:
    """Text that UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
