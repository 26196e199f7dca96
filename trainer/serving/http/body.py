"""The body of a request, read within its limits of size and time; and waiting for an answer as long as the client does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from trainer.serving.http.faults import RefusedError, busy, too_large

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGoneError(Exception):
    """The client has closed its connection: nobody waits for an answer."""


async def read_body(
    receive: Receive, headers: Mapping[str, str], most: int, seconds: float, hold: Callable[[int], None]
) -> bytearray:
    """The whole body.

    Args:
        most: bytes that it may have, whether it says how many come or not.
        seconds: until all of it has come.
        hold: is called with the bytes that are held, before they are.

    Raises:
        RefusedError: 413 for too many bytes, 408 for too much time, and what `hold` raises.
        ClientGoneError: the client has left.
    """
    length = headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length[:20]) > most:
        raise too_large(f"the body has {length[:20]} bytes; at most {most} are taken")
    body = bytearray()
    try:
        async with _limit(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                if len(body) + len(chunk) > most:
                    raise too_large(f"the body has more than {most} bytes, which is as many as are taken")
                hold(len(chunk))
                body += chunk
                if not message.get("more_body", False):
                    return body
    except asyncio.TimeoutError as error:
        raise RefusedError(
            408, "slow_body", f"the body did not come within {seconds:g} seconds", headers={"Connection": "close"}
        ) from error


async def wait_for_answer(answer: asyncio.Future[T], receive: Receive, seconds: float) -> T:
    """The value of `answer`, whose body was read, unless the client leaves; then it is cancelled.

    Raises:
        RefusedError: 429, it takes too long.
        ClientGoneError: the client has left.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        both: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(both, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise ClientGoneError
        raise busy(
            "no_answer_in_time",
            "there was no answer in time: the server is busy, or the request asks much; ask later, or for fewer samples",
        )
    finally:
        answer.cancel()  # of no effect where it is there
        answer.add_done_callback(lambda future: future.cancelled() or future.exception())  # which is then looked at
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def _limit(seconds: float) -> Any:
    """As asyncio.timeout, which Python 3.10 lacks."""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def stop() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, stop)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            if hasattr(task, "uncancel"):
                task.uncancel()
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()
