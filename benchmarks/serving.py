"""How fast, how safe and how steady is `egmf serve`? Real servers, real sockets.

    python -m benchmarks.serving --work DIR --out FILE [--part load|hostile|soak ...] [--seconds 20] [--attacks 10000] [--requests 20000]

- load: p50, p99 and throughput at 1, 8 and 64 clients, who each ask one sample after the other; batched against `--unbatched`.
- hostile: attacks of :mod:`benchmarks.hostile_requests`; each must be refused with a reason, good requests between them answered.
- soak: as many requests as an hour at 5 to 6 a second has, of mixed sizes; memory must stay flat.

DIR holds a small trained run, which is made where it is not there. The server and its clients share the machine. FILE is JSON with the machine
described; the exit code is 1 where an attack got through, a good request was not answered, or memory grew.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.hostile_requests import MAKERS, Target, attack
from benchmarks.machine import describe, today

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 8, 64)
WARM_UP = 3.0  # seconds that are not measured
READY = 300.0  # seconds until a server must be ready
WIDTHS = {"audio": 6, "video": 5}  # of the run's toy data
FRAMES = {"audio": 150, "video": 60}  # of a sample, at most
GROWTH = 0.05  # of resident memory over a soak, beyond what it was in its second quarter
TASK = "meld"
PARTS = ("load", "hostile", "soak")
# a backbone in which a pass costs what a pass costs, so that the figures are those of the model and not of HTTP alone
BACKBONE = (
    "model.backbone.tiny.hidden_size=256",
    "model.backbone.tiny.intermediate_size=1024",
    "model.backbone.tiny.layers=6",
    "model.backbone.tiny.vocab_size=400",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement of load")
    parser.add_argument("--attacks", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=20_000, help="of the soak")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    given = parser.parse_args()
    run = make_run(given.work)
    found: dict[str, Any] = {
        "date": today(),
        "machine": describe("torch", "transformers", "fastapi", "uvicorn", "h11", "python-multipart"),
        "model": list(BACKBONE),
    }
    faults: list[str] = []
    for part in given.part or PARTS:
        measure: Callable[[], tuple[dict[str, Any], list[str]]] = {
            "load": lambda: load(run, given.clients, given.seconds),
            "hostile": lambda: hostile(run, given.attacks),
            "soak": lambda: soak(run, given.requests),
        }[part]
        found[part], more = measure()
        faults += more
        print(part, json.dumps(found[part]), flush=True)
    found["faults"] = faults
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(*faults, sep="\n")
    return 1 if faults else 0


def make_run(work: Path, steps: int = 2) -> Path:
    """A run of a few steps in `work`, made where it is not there."""
    run = work / "run"
    if (run / "run.json").exists() and json.loads((run / "run.json").read_text())["state"] == "done":
        return run
    from tests.toy import prepare_toy

    work.mkdir(parents=True, exist_ok=True)
    prepare_toy(TASK, work)
    words = [
        "train", f"{ROOT}/configs/tiny.yaml", f"task={TASK}", f"data.path={work}/{TASK}", f"train.steps={steps}", "train.global_batch=8",
        "train.micro_batch=4", "track.mlflow=false", "track.report=false", *BACKBONE, "--out", str(run),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "trainer", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return run


@dataclass
class Serving:
    """A server of its own process."""

    port: int
    process: psutil.Popen

    @property
    def memory(self) -> int:
        """Resident bytes of the server and its children."""
        everyone = [self.process, *self.process.children(recursive=True)]
        return sum(one.memory_info().rss for one in everyone)


@contextlib.contextmanager
def served(run: Path, *words: str) -> Iterator[Serving]:
    """`egmf serve` on a free port, until the block ends; then it must end with 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trainer", "serve", str(run), "--port", str(port), *words]
    process = psutil.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + READY
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not become ready")
            time.sleep(0.2)
        yield Serving(port, process)
        process.terminate()
        if process.wait(timeout=90):
            raise RuntimeError(f"the server ended with code {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _is_ready(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def bodies(n: int, seed: int, most: int = 1) -> list[bytes]:
    """Requests of one to `most` samples each, with text, audio and video."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        samples = []
        for i in range(int(rng.integers(1, most + 1))):
            sample: dict[str, Any] = {"id": i, "text": "so " * int(rng.integers(4, 24)) + "it goes"}
            for name, width in WIDTHS.items():
                frames = int(rng.integers(FRAMES[name] // 4, FRAMES[name] + 1))
                sample[name] = rng.normal(size=(frames, width)).round(4).tolist()
            samples.append(sample)
        made.append(json.dumps({"samples": samples, "options": {"probabilities": True}}).encode())
    return made


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(run: Path, clients: Sequence[int], seconds: float) -> tuple[dict[str, Any], list[str]]:
    """p50, p99 and throughput, batched and not."""
    found: dict[str, Any] = {}
    for name, words in (("batched", ()), ("unbatched", ("--unbatched",))):
        with served(run, *words) as server:
            found[name] = {str(n): _clients(server.port, n, seconds) for n in clients}
    most = str(max(clients))
    faster = found["batched"][most]["per_second"] / max(1e-9, found["unbatched"][most]["per_second"])
    found["faster"] = {"clients": int(most), "times": faster, "target": 3.0}
    faults = [
        f"{name}, {n} clients: {one['failed']} requests were not answered"
        for name in ("batched", "unbatched")
        for n, one in found[name].items()
        if one["failed"]
    ]
    return found, faults


def _clients(port: int, n: int, seconds: float) -> dict[str, Any]:
    """What `n` clients see, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_ask_for, args=(port, n, seconds, sending))
    process.start()
    seen: dict[str, Any] = receiving.recv()
    process.join()
    return seen


def _ask_for(port: int, n: int, seconds: float, sending: Any) -> None:
    made = bodies(64, seed=n)
    begin = time.monotonic() + WARM_UP
    end = begin + seconds
    taken: list[float] = []
    failed = 0

    def client(k: int) -> None:
        nonlocal failed
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        i = k
        while (started := time.monotonic()) < end:
            good = _ask(connection, made[i % len(made)])
            done = time.monotonic()
            if started >= begin and done <= end:
                failed += not good
                taken.append(done - started)
            i += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(k,)) for k in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(taken, [50, 99]) if taken else (float("nan"), float("nan"))
    sending.send(
        {
            "requests": len(taken),
            "failed": failed,
            "per_second": len(taken) / seconds,
            "p50_ms": 1000 * p50,
            "p99_ms": 1000 * p99,
        }
    )


def _ask(connection: http.client.HTTPConnection, body: bytes) -> bool:
    """Whether a request was answered."""
    try:
        connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200
    except (OSError, http.client.HTTPException):
        connection.close()  # it is opened anew by the next request
        return False


# ── hostile ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hostile(run: Path, attacks: int) -> tuple[dict[str, Any], list[str]]:
    """What became of attacks, and the server's memory before and after."""
    limits = "--max-body-mib 1 --max-clip-mib 1 --max-held-mib 64 --max-samples 16 --max-frames 200 --max-text 300 --body-seconds 1"
    with served(run, *limits.split()) as server:
        target = Target(server.port, task=TASK, audio=WIDTHS["audio"])
        attack(target, 10 * len(MAKERS), seed=1)  # what is loaded once is there now
        before, peak = server.memory, _Peak(server)
        started = time.monotonic()
        with peak:
            judged = attack(target, attacks, clients=32)
        taken, after = time.monotonic() - started, server.memory
    found = {
        "attacks": dict(judged.sent),
        "statuses": {str(status): n for status, n in sorted(judged.statuses.items())},
        "codes": dict(judged.codes),
        "good_answered": judged.good,
        "seconds": taken,
        "memory_mib": {"before": before >> 20, "most": peak.most >> 20, "after": after >> 20},
    }
    faults = list(judged.wrong)
    if peak.most - before > 512 << 20:
        faults.append(f"memory grew by {(peak.most - before) >> 20} MiB under attack")
    return found, faults


class _Peak:
    """The most memory of a server while the block runs, looked at ten times a second."""

    def __init__(self, server: Serving) -> None:
        self._server, self._end, self.most = server, threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.most = max(self.most, self._server.memory)


# ── soak ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def soak(run: Path, requests: int, clients: int = 8) -> tuple[dict[str, Any], list[str]]:
    """Requests of mixed sizes, one in fifty cut off; the server's memory after every twentieth part of them."""
    made = bodies(200, seed=0, most=4)
    seen: list[int] = []
    failed = 0
    with served(run) as server:
        started = time.monotonic()
        for part in range(20):
            failed += _soak_part(server.port, made, requests // 20, clients, part)
            seen.append(server.memory)
        taken = time.monotonic() - started
    early, late = max(seen[5:10]), max(seen[-5:])
    found = {
        "requests": requests, "failed": failed, "seconds": taken, "memory_mib": [one >> 20 for one in seen], "growth": late / early - 1,
    }  # fmt: skip
    faults = [f"{failed} requests of the soak were not answered"] if failed else []
    if late > early * (1 + GROWTH):
        faults.append(f"memory grew from {early >> 20} to {late >> 20} MiB over {requests} requests")
    return found, faults


def _soak_part(port: int, made: Sequence[bytes], n: int, clients: int, seed: int) -> int:
    """How many of `n` requests were not answered, but for those that were cut off."""
    failed = [0] * clients

    def client(k: int) -> None:
        rng = random.Random(f"{seed} {k}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for _ in range(n // clients):
            body = rng.choice(made)
            if rng.random() < 0.02:
                _leave(port, body)
            else:
                failed[k] += not _ask(connection, body)
        connection.close()

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(failed)


def _leave(port: int, body: bytes) -> None:
    """Send a request and go before it is answered."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)


if __name__ == "__main__":
    sys.exit(main())
