"""Requests that mean harm, or that a broken client sends: made at random, sent over plain sockets, and their replies judged.

Each must be refused with a status from 400 to 499 and a reason in JSON; a client that leaves gets nothing and costs nothing.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import socket
import struct
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PATIENCE = 30.0  # seconds until a reply must be there
Piece = bytes | float  # what is sent, or the seconds of a pause


@dataclass(frozen=True)
class Attack:
    """What is sent; `reply` is false where the client leaves without reading."""

    name: str
    pieces: Sequence[Piece]
    reply: bool = True


@dataclass
class Judged:
    """What came of many attacks: how many by name and status, those that went wrong, and good requests between them."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    good: int = 0


@dataclass(frozen=True)
class Target:
    """A server, and what its limits are."""

    port: int
    task: str = "meld"
    audio: int = 6  # features per frame
    max_body: int = 1 << 20
    max_samples: int = 16
    max_frames: int = 200
    max_text: int = 300
    body_seconds: float = 1.0


def attack(target: Target, n: int, seed: int = 0, clients: int = 16) -> Judged:
    """Send `n` attacks from several clients, and after each twentieth a good request, which must be answered."""
    judged, lock = Judged(), threading.Lock()

    def one(i: int) -> None:
        rng = random.Random(f"{seed} {i}")
        made = MAKERS[i % len(MAKERS)](rng, target)
        status, code, fault = _send(target, made)
        with lock:
            judged.sent[made.name] += 1
            if status:
                judged.statuses[status] += 1
                judged.codes[code] += 1
            if fault:
                judged.wrong.append(f"{i} {made.name}: {fault}")
        if i % 20 == 0:
            body = json.dumps({"samples": [{"text": "good", "task": target.task}]}).encode()
            status, _, _ = _send(target, Attack("good", [post(body)]))
            with lock:
                judged.good += status == 200
                if status not in (200, 429):
                    judged.wrong.append(f"{i}: a good request got {status}")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(n)))
    return judged


def _send(target: Target, made: Attack) -> tuple[int, str, str]:
    """Status and code of the reply, and what is wrong with it."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE) as connection:
        with contextlib.suppress(ConnectionError, socket.timeout):
            for piece in made.pieces:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                else:
                    time.sleep(piece)
        if not made.reply:
            if hash(made.name) % 2:  # with a reset instead of a farewell
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return 0, "", ""
        try:
            head, body = _reply(connection)
        except (OSError, ValueError) as error:
            return 0, "", f"no reply: {error!r}"
    status = int(head.split(None, 2)[1])
    if made.name == "good":
        return status, "", ""
    try:
        error = json.loads(body)["error"]
        reason = bool(error["message"]) and error["code"] and isinstance(error["faults"], list)
    except (ValueError, KeyError, TypeError):
        return status, "", f"status {status} without a reason: {body[:100]!r}"
    return status, error["code"], "" if 400 <= status < 500 and reason else f"status {status}: {body[:200]!r}"


def _reply(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            raise ValueError(f"the connection was closed after {data[:60]!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        more = connection.recv(65536)
        if not more:
            raise ValueError("the connection was closed within the reply")
        body += more
    return head, body[:length]  # what follows answers what a client sent beyond its request


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def post(
    body: bytes, *headers: str, kind: str = "application/json", length: bool = True, path: str = "/v1/predict"
) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def request(samples: Any, **more: Any) -> bytes:
    return post(json.dumps({"samples": samples, **more}).encode())


def _junk(rng: random.Random) -> Any:
    return rng.choice(
        [None, True, -1, 10**400, 1e308, "x" * 5000, "", " ", [], {}, [[]], {"npz": 1}, {"a": []}, [None], "\0", 2**63]
    )


def broken_json(rng: random.Random, target: Target) -> Attack:
    good = b'{"samples": [{"text": "a"}]}'
    made = rng.choice(
        [
            good[: rng.randrange(len(good) - 1)],
            good.replace(b'"a"', b"NaN"),
            good.replace(b'"a"', b"-Infinity"),
            good.replace(b"a", b"\xff\xfe"),
            good.replace(b"a", b"\\ud800"),
            b"[" * rng.randrange(200, 100_000),
            b'{"a":' * rng.randrange(200, 50_000),
            b"\xef\xbb\xbf" + good,
            good + good,
            b"[]",
            b"null",
            b'"text"',
            b"1" * 5000,
            good.replace(b'"a"', b"1" + b"0" * rng.randrange(100, 5000)),
            bytes(rng.randrange(256) for _ in range(rng.randrange(200))) + b"\0",
            good.decode().encode("utf-16"),
        ]
    )
    return Attack("broken JSON", [post(made)])


def wrong_types(rng: random.Random, target: Target) -> Attack:
    keys = (
        "text",
        "task",
        "audio",
        "video",
        "audio_length",
        "rate",
        "speaker",
        "dialogue",
        "turn",
        "clip",
        "start",
        "path",
        "txt",
    )
    key = rng.choice(keys)
    value = _junk(rng)
    # an empty rate, and a text of one NUL, are odd and no faults
    while value is None or (key, value) in (("rate", {}), ("text", "\0")):
        value = _junk(rng)
    sample = {"text": "a", "task": target.task, key: value}
    if key in ("audio_length", "turn"):
        sample[key] = rng.choice(["3", 1.5, True, [], 2**70])
    if key in ("speaker", "dialogue"):
        sample[key] = rng.choice([True, 1.5, [], "x" * 300, "", 2**70])
    return Attack("wrong types", [request([sample])])


def wrong_request(rng: random.Random, target: Target) -> Attack:
    good = {"text": "a", "task": target.task}
    made = rng.choice(
        [
            request([]),
            request({}),
            request([good] * (target.max_samples + 1)),
            request([1, None, []]),
            request([good], options={"probabilities": 1}),
            request([good], options=[]),
            request([good], options={"paths": True}),
            request([good], sample=1),
            request([{**good, "id": "x"}, {**good, "id": "x"}]),
            request([{**good, "text": "y" * (target.max_text + 1)}]),
            request([{"task": target.task}]),
            request([{**good, "task": "no such task"}]),
        ]
    )
    return Attack("wrong requests", [made])


def paths(rng: random.Random, target: Target) -> Attack:
    name = rng.choice(
        [
            "/etc/passwd",
            "../../etc/passwd",
            "file:///etc/passwd",
            "/proc/self/mem",
            "/dev/zero",
            "http://127.0.0.1/",
            "a.npz",
        ]
    )
    key = rng.choice(["audio", "video", "clip"])
    return Attack("paths", [request([{"text": "a", "task": target.task, key: name}])])


def wrong_arrays(rng: random.Random, target: Target) -> Attack:
    width = target.audio
    rows: list[Any] = [[0.5] * width for _ in range(3)]
    how = rng.randrange(9)
    if how == 0:
        rows[1] = rows[1][:-1]
    elif how == 1:
        rows[2][0] = rng.choice(["1.0", None, True, [], {}, 10**400])
    elif how == 2:
        rows = [[0.5] * (width + 1)] * 3
    elif how == 3:
        rows = [[0.5] * width] * (target.max_frames + 1)
    elif how == 4:
        rows = [rows]
    elif how == 5:
        rows = []
    elif how == 6:
        rows = [[1e39] * width]
    elif how == 7:
        rows = [0.5] * width
    else:
        rows = [[0.5] * 9000]
    return Attack("wrong arrays", [request([{"text": "a", "task": target.task, "audio": rows}])])


def _npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=pickled)
    return out.getvalue()


def _claiming(shape: str, kind: str = "<f4", content: bytes = b"") -> bytes:
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (63 - (len(head) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + content


def _zipped(content: bytes, name: str = "audio.npy", **more: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content, **more)
    return out.getvalue()


_BOMB = _zipped(_claiming("(2000000, 6)", content=bytes(48_000_000)))
_MANY = io.BytesIO()
with zipfile.ZipFile(_MANY, "w") as _archive:
    for _i in range(2000):
        _archive.writestr(f"{_i}.npy", b"")


def wrong_bytes(rng: random.Random, target: Target) -> Attack:
    width = target.audio
    good = np.zeros((3, width), np.float32) + 1
    nan = good.copy()
    nan[1, 2] = rng.choice([np.nan, np.inf, -np.inf])
    kind, content = rng.choice(
        [
            ("npy", _npy(nan)),
            ("npz", _zipped(_npy(nan))),
            ("npy", _npy(np.array([[{}, print]], dtype=object), pickled=True)),
            ("npz", _zipped(_npy(np.array([[{}]], dtype=object), pickled=True))),
            ("npz", _BOMB),
            ("npz", _zipped(_claiming(f"(100, {width})", content=bytes(50_000_000)))),
            ("npz", _MANY.getvalue()),
            ("npz", _zipped(_zipped(_npy(good)))),
            ("npz", _zipped(_npy(good))[: rng.randrange(10, 100)]),
            ("npy", _claiming(f"(1000000000000, {width})")),
            ("npy", _claiming(f"(-3, {width})")),
            ("npy", _claiming(f"(3, {width})")),
            ("npy", _claiming("(0, 6)")),
            ("npy", _claiming("(3, 6, 1)", content=bytes(72))),
            ("npy", _npy(np.array([["a"] * width]))),
            ("npy", _npy(good.astype(np.complex64))),
            ("npy", _npy(np.full((2, width), 1e300))),
            ("npy", b"\x93NUMPY\x01\x00" + b"\xff\xff" + b"(" * 60_000),
            ("npy", b""),
            ("npz", b"PK\x05\x06" + bytes(18)),
            ("npy", bytes(rng.randrange(256) for _ in range(100))),
        ]
    )
    if rng.random() < 0.2 and content:
        place = rng.randrange(len(content))
        content = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        content = content if rng.random() < 0.5 else content[:place]
        kind, content = "npz", content + b"\0"
    text = base64.b64encode(content).decode()
    if rng.random() < 0.1:
        text = text[:-1] + "*"
    return Attack("wrong bytes", [request([{"text": "a", "task": target.task, "audio": {kind: text}}])])


def too_large(rng: random.Random, target: Target) -> Attack:
    size = target.max_body + rng.randrange(1, 1 << 20)
    chunk = b"x" * 65536
    if rng.random() < 0.5:
        return Attack(
            "too large", [post(b"", f"Content-Length: {size}", length=False), *[chunk] * (size // len(chunk) + 1)]
        )
    pieces = [b"%x\r\n" % len(chunk) + chunk + b"\r\n"] * (size // len(chunk) + 1)
    return Attack("too large, chunked", [post(b"", "Transfer-Encoding: chunked", length=False), *pieces])


def many_brackets(rng: random.Random, target: Target) -> Attack:
    n = target.max_body // 4
    return Attack("many brackets", [post(b'{"samples": [' + b"[]," * n + b"[]]}")])


def slow_body(rng: random.Random, target: Target) -> Attack:
    head = post(b"", "Content-Length: 1000", length=False)
    return Attack(
        "slow bodies", [head, b'{"samples"', 0.3 * target.body_seconds, b": [", 0.3 * target.body_seconds, b"1"]
    )


def slow_headers(rng: random.Random, target: Target) -> Attack:
    return Attack("slow headers", [b"POST /v1/predict HTTP/1.1\r\n", 0.2 * target.body_seconds, b"Host: 127.0.0.1\r\n"])


def cut_short(rng: random.Random, target: Target) -> Attack:
    whole = request([{"text": "cut " * 20, "task": target.task}])
    return Attack("cut connections", [whole[: rng.randrange(1, len(whole))]], reply=False)


def leaves_early(rng: random.Random, target: Target) -> Attack:
    whole = request([{"text": "gone", "task": target.task}] * 1)
    return Attack("clients that leave", [whole, rng.random() * 0.01], reply=False)


def bad_http(rng: random.Random, target: Target) -> Attack:
    good = request([{"text": "a", "task": target.task}])
    made = rng.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabc",
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
            good.replace(b"Host: 127.0.0.1", b"Host: evil.example"),
            good.replace(b"Host: 127.0.0.1", b"Host: 127.0.0.1.evil.example"),
            good.replace(b"Content-Type", b"Origin: http://evil.example\r\nContent-Type"),
            good.replace(b"application/json", b"text/plain"),
            good.replace(b"Content-Type", b"Content-Encoding: gzip\r\nContent-Type"),
            good.replace(b"POST /v1/predict", b"DELETE /v1/predict"),
            good.replace(b"POST /v1/predict", b"GET /../../../../etc/passwd"),
            good.replace(b"POST /v1/predict", b"GET /%2e%2e/%2e%2e/etc/passwd"),
            good.replace(b"POST /v1/predict", b"GET /page.js/../../worker.py"),
            good.replace(b"POST", b"BREW"),
        ]
    )
    return Attack("bad HTTP", [made])


def bad_form(rng: random.Random, target: Target) -> Attack:
    def part(name: str, content: bytes, file: bool = False) -> bytes:
        more = '; filename="x"' if file else ""
        return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"

    task = part("task", target.task.encode())
    text = part("text", b"hello")
    body, kind = rng.choice(
        [
            (task + text, "multipart/form-data; boundary=b"),  # has no end
            (task + text + b"--b--\r\n", "multipart/form-data"),
            (task + text + b"--c--\r\n", "multipart/form-data; boundary=c"),
            (b"", "multipart/form-data; boundary=b"),
            (task + part("text", b"\xff\xfe") + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + text + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (part("x", b"") * 1 + task + text + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (b"".join(part(f"x{i}", b"") for i in range(500)) + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + part("clip", b"RIFF" + bytes(100), True) + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + part("features", _BOMB, True) + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + part("audio", b"/etc/passwd") + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + part("turn", b"1e3") + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + part("start", b"nan") + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (task + b"--b--\r\n", "multipart/form-data; boundary=b"),
            (b"--b\r\n" + b"X: " + b"a" * 50_000 + b"\r\n\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b"),
            (task + text + b"--b--\r\n", "multipart/form-data; boundary=" + "b" * 5000),
        ]
    )
    return Attack("bad forms", [post(body, kind=kind)])


MAKERS: tuple[Callable[[random.Random, Target], Attack], ...] = (
    broken_json, wrong_types, wrong_request, paths, wrong_arrays, wrong_bytes, bad_http, bad_form, cut_short, wrong_bytes,
    leaves_early, wrong_types, broken_json, bad_http, bad_form, too_large, wrong_bytes, wrong_request, slow_body, slow_headers,
    many_brackets,
)  # fmt: skip
