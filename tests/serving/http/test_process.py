"""The command as its user has it: it starts, says when it is ready, answers what it has taken when it is told to stop, and ends with 0."""

from __future__ import annotations

import contextlib
import http.client
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.processes import egmf, free_port
from tests.serving.http.servers import Reply, serving, started, until
from tests.tones import make_tones
from trainer.serving.predictor import Predictor


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tones(tmp_path_factory.mktemp("tones"))


MANY = [{"id": i, "task": "simsv2", "text": f"so {i} " * 30} for i in range(60)]


@pytest.mark.distributed
def test_from_start_to_a_graceful_end(run: Path) -> None:
    port = free_port()
    elsewhere = {"PROMETHEUS_MULTIPROC_DIR": "/no/such/folder"}  # as another service's environment may have it
    with started(port, str(run), "--max-wait-ms", "0", **elsewhere) as server:
        seen: set[tuple[int, str]] = set()
        end = time.monotonic() + 120
        while (200, "ready") not in seen:
            assert time.monotonic() < end
            assert server.process.poll() is None, server.end()
            try:
                reply = server.get("/readyz")
                seen.add((reply.status, reply.json["status"] if reply.status == 200 else reply.error["code"]))
                if reply.status == 503:
                    assert server.get("/healthz").status == 200
                    assert server.predict([{}]).status in (503, 422)  # it may be ready meanwhile
            except OSError:
                pass
            time.sleep(0.05)
        assert seen == {(503, "loading"), (200, "ready")}

        replies: list[Reply] = []
        clients = [threading.Thread(target=lambda: replies.append(server.predict(MANY))) for _ in range(4)]
        for client in clients:
            client.start()
        while not any(b"egmf_queue_samples 240" in line for line in server.get("/metrics").body.splitlines()):
            assert not replies, "the server was too quick for this test"
        server.process.send_signal(signal.SIGTERM)
        refused = server.predict(MANY[:1])
        assert (refused.status, refused.error["code"]) == (503, "stopping")
        for client in clients:
            client.join()
        assert [reply.status for reply in replies] == [200] * 4
        assert all(len(reply.json["predictions"]) == 60 for reply in replies)
        code, log = server.end()
        assert code == 0, log
        assert "Traceback" not in log


@pytest.mark.distributed
def test_workers_share_the_port_and_their_figures(run: Path) -> None:
    port = free_port()
    with started(port, str(run), "--workers", "2") as server:
        server.until_ready()
        until(lambda: b"egmf_ready 2.0" in server.get("/metrics").body, 120)
        for _ in range(8):
            assert server.predict(MANY[:1]).status == 200
        assert b'egmf_predictions_total{task="simsv2"} 8.0' in server.get("/metrics").body

        def workers() -> set[int]:
            children = psutil.Process(server.process.pid).children()
            alive = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
            return {one.pid for one in alive if any("spawn_main" in word for word in one.cmdline())}

        first = workers()
        assert len(first) == 2
        killed = min(first)
        psutil.Process(killed).kill()
        until(lambda: len(workers()) == 2 and killed not in workers(), 60)
        assert b"egmf_ready 1.0" in server.get("/metrics").body
        until(lambda: b"egmf_ready 2.0" in server.get("/metrics").body, 120)
        server.process.send_signal(signal.SIGINT)
        code, log = server.end()
        assert code == 0, log
        assert "another one takes its place" in log
        assert "Traceback" not in log


def test_a_signal_takes_no_lock_that_its_thread_may_hold(predictor: Predictor) -> None:
    with serving(predictor) as server:
        with server.server.service._lock:
            server.server.handle_exit(signal.SIGTERM, None)  # as if it came while the lock is held
        until(lambda: not server.thread.is_alive())


@pytest.mark.distributed
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_signal_leaves_no_clip_behind(tones: Path, tmp_path: Path, workers: str) -> None:
    port = free_port()
    with started(port, str(tones / "run"), "--workers", workers, TMPDIR=str(tmp_path)) as server:
        server.until_ready()
        folders = tmp_path.glob("egmf-serve-*") if workers == "1" else tmp_path.glob("egmf-serve-*/egmf-serve-*")
        clip = next(folders) / "sent.clip"
        clip.write_bytes(b"of a client")
        server.process.send_signal(signal.SIGSTOP)
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        code, _ = server.end(10)
        assert code != 0
        until(lambda: not clip.exists(), 5)


@pytest.mark.distributed
def test_a_second_signal_ends_at_once(run: Path) -> None:
    port = free_port()
    with started(port, str(run)) as server:
        server.until_ready()

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.predict(MANY)

        threading.Thread(target=ask, daemon=True).start()
        while b"egmf_queue_samples 60" not in server.get("/metrics").body:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        code, _ = server.end(10)
        assert code != 0


def test_what_cannot_be_served_is_said(run: Path, tmp_path: Path) -> None:
    for words, told in (
        ((str(tmp_path / "nothing"),), "nothing"),
        ((str(run), "--host", "0.0.0.0"), "--token-file"),
        ((str(run), "--host", "no.such.host.invalid", "--token-file", "x"), "cannot be read"),
        ((str(run), "--max-queue", "0"), "--max-queue is at least 1"),
    ):
        done = egmf("serve", *words, "--port", str(free_port()))
        assert done.returncode == 1
        assert told in done.stderr
        assert "listening" not in done.stderr
        assert "Traceback" not in done.stderr
    from trainer.serving.http.server import listen

    with listen("127.0.0.1", 0) as taken:
        done = egmf("serve", str(run), "--port", str(taken.getsockname()[1]))
        assert done.returncode == 1
        assert "choose another with --port" in done.stderr
