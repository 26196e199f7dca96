"""Connections: how many there may be, and how long one may stay without asking or reading anything."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.serving.http.faults import error_body
from trainer.serving.http.limits import Limits
from trainer.serving.http.security import HEADERS

KEEP_ALIVE = 15  # seconds that a connection stays open between two requests
SWEEP = 1.0  # seconds between two looks at all connections
READING = 30.0  # seconds that a client may take to read its answer


def protocol_class(limits: Limits, refused: Callable[[str], None]) -> type[asyncio.Protocol]:
    """uvicorn's protocol with limits; `refused` is told the code of each refusal, which no application sees."""
    idle = max(limits.body_seconds, KEEP_ALIVE)
    longest = 2 * limits.body_seconds + limits.answer_seconds + READING

    class LimitedProtocol(H11Protocol):
        """One connection."""

        since: float  # it asks for nothing
        asked: float  # the time of its request

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.access_log = False  # whose lines have what clients wrote, wherever logging is set up anew

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.since = time.monotonic()
            if len(self.connections) > limits.max_connections:
                self.refuse(
                    429, "too_many_connections", "too many connections are open: ask again", "Retry-After: 1\r\n"
                )

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self.asked = time.monotonic()

        def on_response_complete(self) -> None:
            self.since = time.monotonic()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            self.refuse(400, "bad_http", "this is no HTTP request that can be read, or its headers are too long")

        def sweep(self, now: float) -> None:
            """Close the connection where its client has taken too long."""
            if self.cycle is None and now - self.since > limits.body_seconds:
                self.refuse(408, "slow_headers", f"no request came within {limits.body_seconds:g} seconds")
            elif self.cycle is not None and self.cycle.response_complete and now - self.since > idle:
                self.transport.close()
            elif self.cycle is not None and not self.cycle.response_complete and now - self.asked > longest:
                self.transport.abort()

        def refuse(self, status: int, code: str, message: str, more: str = "") -> None:
            """Answer without the application, and close."""
            refused(code)
            if not self.transport.is_closing():
                self.transport.write(_response(status, code, message, more))
                self.transport.close()

    return LimitedProtocol


async def sweep_for_ever(connections: set[Any]) -> None:
    """Look at all connections now and then."""
    while True:
        await asyncio.sleep(SWEEP)
        now = time.monotonic()
        for one in list(connections):
            one.sweep(now)


def _response(status: int, code: str, message: str, more: str) -> bytes:
    body = json.dumps(error_body(code, message)).encode()
    reason = {400: "Bad Request", 408: "Request Timeout", 429: "Too Many Requests"}[status]
    headers = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    head = f"HTTP/1.1 {status} {reason}\r\n{headers}{more}content-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
