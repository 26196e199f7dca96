"""Every limit: what exceeds it is refused with its own code, and what does not is answered."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.serving.http.conftest import SMALL
from tests.serving.http.servers import InThread, Reply, form, serving, until
from tests.serving.http.test_predict import packed
from trainer.serving.http.limits import Limits
from trainer.serving.prediction import Prediction, Prepared
from trainer.serving.predictor import Predictor

ONE = {"text": "one", "task": "meld"}


def faults(reply: Reply) -> dict[str, str]:
    return {one["where"]: one["reason"] for one in reply.error["faults"]}


def test_all_faults_of_a_request_are_told_at_once(server: InThread) -> None:
    given = [
        {"text": 1, "task": "meld"},
        {"text": "x" * 301, "task": "melt", "audio": "/etc/passwd", "turn": 1.5},
        {"task": "meld", "audio": [[0.0] * 6, [0.0] * 5, [True] * 6], "vidio": [[1]]},
        {"task": "meld"},
        {"id": "a", **ONE},
        {"id": "a", **ONE},
        {"task": "meld", "rate": {"audio": 0}, "text": "", "clip": "a.mp4"},
    ]
    reply = server.predict(given, gats=True)
    assert (reply.status, reply.error["code"]) == (422, "bad_samples")
    found = faults(reply)
    assert set(found) == {
        "options.gats", "samples[0].text", "samples[1].text", "samples[1].task", "samples[1].audio", "samples[1].turn",
        "samples[2].audio[1]", "samples[2].audio[2][0]", "samples[2].vidio", "samples[3]", "samples[5].id", "samples[6].rate",
        "samples[6].clip",
    }  # fmt: skip
    assert "did you mean video" in found["samples[2].vidio"]
    assert "opens no file" in found["samples[1].audio"]


def test_what_only_the_model_can_tell_is_told_with_its_place(server: InThread) -> None:
    reply = server.predict([ONE, {"task": "meld", "audio": [[1.0] * 7]}, {"text": "no task"}])
    assert reply.status == 422
    assert set(faults(reply)) == {"samples[1]", "samples[2]"}
    assert "7 features per frame instead of 6" in faults(reply)["samples[1]"]


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ([ONE] * 17, "samples"),
        ([{"task": "meld", "text": "x" * 301}], "samples[0].text"),
        ([{"task": "meld", "audio": [[1.0] * 6] * 201}], "samples[0].audio"),
        ([{"task": "meld", "audio": [[float(10**39)] * 6]}], "samples[0].audio[0][0]"),
        ([{"task": "meld", "id": "x" * 201, "text": "a"}], "samples[0].id"),
    ],
)
def test_one_more_than_a_limit_is_refused(server: InThread, given: Sequence[Any], where: str) -> None:
    reply = server.predict(given)
    assert reply.status == 422
    assert set(faults(reply)) == {where}


def test_as_much_as_the_limits_is_answered(server: InThread) -> None:
    assert server.predict([{**ONE, "id": i} for i in range(16)]).status == 200
    assert server.predict([{"task": "meld", "text": "x" * 300, "audio": [[1.0] * 6] * 200}]).status == 200


def test_compressed_zeros_are_refused_before_they_are_made(server: InThread) -> None:
    bomb = packed(np.zeros((2_000_000, 6), np.float32), "compressed")
    assert len(bomb) < 1 << 17
    reply = server.ask("POST", "/v1/predict", *form({"task": "meld"}, {"audio": bomb}))
    assert reply.status == 422
    assert "2000000 frames; at most 200" in faults(reply)["audio"]


def test_a_negative_shape_does_not_make_room_for_others(server: InThread) -> None:
    negative, large = io.BytesIO(), np.zeros((200, 8192))
    np.lib.format.write_array_header_1_0(negative, {"descr": "<f4", "fortran_order": False, "shape": (-(10**9), 6)})
    audio = {"npy": base64.b64encode(negative.getvalue()).decode()}
    reply = server.predict([{"task": "meld", "audio": audio}])
    assert (reply.status, set(faults(reply))) == (422, {"samples[0].audio.npy"})
    video = {"npz": base64.b64encode(packed(large, "compressed", "video")).decode()}
    alone = server.predict([{"task": "meld", "video": video}])
    beside = server.predict([{"task": "meld", "audio": audio}, {"task": "meld", "video": video}])
    assert [(one.status, one.error["code"]) for one in (alone, beside)] == [(413, "too_large")] * 2
    assert "take more than" in alone.error["message"]


def test_bodies_are_limited_with_and_without_a_length(server: InThread) -> None:
    large = json.dumps({"samples": [{**ONE, "text": "x" * (1 << 20)}]}).encode()
    assert (reply := server.post(large)).status == 413
    assert reply.error["code"] == "too_large"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(20):
            raw.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_expects_to_be_told_sends_no_large_body(server: InThread) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_slow_bodies_and_slow_headers_end(server: InThread) -> None:
    for sent, code in ((b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{", b"slow_body"),
                       (b"POST /v1/pre", b"slow_headers")):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            started = time.monotonic()
            raw.sendall(sent)
            reply = b""
            while more := raw.recv(4096):
                reply += more
            assert reply.startswith(b"HTTP/1.1 408 ")
            assert code in reply
            assert 0.9 < time.monotonic() - started < 4


class Held:
    """A predictor whose model waits until it is let go."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self.go, self.batches = predictor, threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def answer(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        self.batches += 1
        assert self.go.wait(60)
        return self._predictor.answer(prepared)


@pytest.fixture
def held(predictor: Predictor) -> Iterator[Held]:
    made = Held(predictor)
    yield made
    made.go.set()


def asked_in_thread(server: InThread, samples: Any) -> tuple[threading.Thread, list[Reply]]:
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(server.predict(samples)))
    thread.start()
    return thread, replies


def test_a_full_queue_asks_clients_to_come_back(held: Held) -> None:
    limits = replace(SMALL, max_queue=4, max_samples=4)
    with serving(held, limits) as server:  # type: ignore[arg-type]
        places = server.server.service.places
        thread, replies = asked_in_thread(server, [{**ONE, "id": i} for i in range(3)])
        until(lambda: places.held == 3)
        reply = server.predict([{**ONE, "id": i} for i in range(2)])
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        held.go.set()
        thread.join()
        assert replies[0].status == 200
        assert server.predict([{**ONE, "id": i} for i in range(4)]).status == 200
        assert places.held == 0


def test_an_answer_that_takes_too_long_is_given_up(held: Held) -> None:
    with serving(held, replace(SMALL, answer_seconds=0.3)) as server:  # type: ignore[arg-type]
        reply = server.predict([ONE])
        assert (reply.status, reply.error["code"]) == (429, "no_answer_in_time")
        assert "retry-after" in reply.headers
        held.go.set()
        assert server.server.service.places.held == 0


def test_clients_that_leave_cost_the_others_nothing(held: Held) -> None:
    with serving(held, SMALL) as server:  # type: ignore[arg-type]
        service = server.server.service
        first, replies = asked_in_thread(server, [ONE])
        until(lambda: held.batches == 1)
        body = json.dumps({"samples": [ONE]}).encode()
        for _ in range(3):
            raw = socket.create_connection(("127.0.0.1", server.port))
            raw.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + b"Content-Length: %d\r\n\r\n" % len(body)
                + body
            )
            until(lambda: service.places.held == 2)
            raw.close()
            until(lambda: service.places.held == 1)
        last, more = asked_in_thread(server, [ONE])
        until(lambda: service.places.held == 2)
        held.go.set()
        first.join()
        last.join()
        assert [replies[0].status, more[0].status] == [200, 200]
        assert held.batches == 2  # those that left were not in a batch
        assert b"egmf_cancelled_total 3.0" in server.get("/metrics").body


def test_all_requests_together_hold_no_more_than_they_may(held: Held) -> None:
    limits = replace(SMALL, max_held_mib=1.2)
    with serving(held, limits) as server:  # type: ignore[arg-type]
        large = [{**ONE, "audio": [[0.123456] * 6] * 200, "id": i} for i in range(12)]
        service = server.server.service
        first = [asked_in_thread(server, large) for _ in range(8)]
        until(lambda: sum(len(replies) for _, replies in first) >= 1)
        refused = next(replies[0] for _, replies in first if replies)
        assert (refused.status, refused.error["code"]) in ((429, "too_much_held"), (429, "queue_full"))
        held.go.set()
        for thread, _ in first:
            thread.join()
        assert {replies[0].status for _, replies in first} == {200, 429}
        assert service.held.held == 0


def test_connections_are_limited(predictor: Predictor) -> None:
    with serving(predictor, replace(SMALL, max_connections=3, body_seconds=5)) as server:
        open_ones = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        until(lambda: len(server.server.server_state.connections) == 3)
        reply = server.get("/healthz")
        assert (reply.status, reply.error["code"]) == (429, "too_many_connections")
        for one in open_ones:
            one.close()
        until(lambda: not server.server.server_state.connections)
        assert server.get("/healthz").status == 200


def test_limits_that_let_nothing_through_are_refused_together() -> None:
    with pytest.raises(ValueError, match="--max-queue is at least 1") as error:
        Limits(max_queue=0, body_seconds=float("nan"), max_held_mib=10)
    for words in ("--body-seconds", "--max-held-mib (10)", "--max-queue (0) is less than --max-samples (64)"):
        assert words in str(error.value)
