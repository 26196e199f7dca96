"""Where the ranks of one machine listen, and what a stranger who reaches their port can do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.distributed.processes import ROOT, environment, free_port, start
from trainer.distributed.handshake import LONGEST, RendezvousError, SignedStore
from trainer.distributed.launcher import EGMF_SECRET
from trainer.distributed.rendezvous import _open_port

SECRET = "5e" * 32


def meet(*secrets: str | None, master: str = "127.0.0.1", port: int | None = None, seconds: float = 60) -> list[str]:
    """The output of one rank for each secret."""
    started = []
    port = port or free_port()
    for rank, secret in enumerate(secrets):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(secrets)), "MASTER_ADDR": master}
        more = {} if secret is None else {EGMF_SECRET: secret}
        env = environment(**place, **more, MASTER_PORT=str(port))
        env.pop(EGMF_SECRET, None) if secret is None else None
        command = [sys.executable, "-m", "tests.multinode.meeting", str(seconds)]
        started.append(start(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        return [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.distributed
@pytest.mark.parametrize("master", ["127.0.0.1", "localhost"])
def test_ranks_of_one_machine_listen_at_the_loopback_alone(master: str) -> None:
    port = free_port()
    for rank, text in enumerate(meet(SECRET, SECRET, master=master, port=port)):
        assert "sum 2" in text, text
        assert "by lo," in text
        listening = text.split("LISTENS ")[1].split()
        assert {place.rpartition(":")[0] for place in listening} <= {"127.0.0.1", "::1"}, listening
        assert any(place.endswith(f":{port}") for place in listening) == (rank == 0)


def _poison(port: int, entries: dict[str, str]) -> None:
    """What a stranger writes as soon as the port is open."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.01)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    for key, value in entries.items():
        store.set(f"egmf/greeting/{key}", value)


@pytest.mark.distributed
def test_a_stranger_who_writes_into_the_handshake_is_refused() -> None:
    """The absent rank 1 is played by somebody who does not know the secret: once with a verdict of his own, too."""
    letter = json.dumps({"host": "x", "address": None, "port": None, "rank": 1, "versions": {}})
    forged = json.dumps({"message": letter, "signature": "0" * 64})
    port = free_port()
    stranger = threading.Thread(target=_poison, args=(port, {"here/1": forged}), daemon=True)
    stranger.start()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.multinode.meeting", "60"]
    env = environment(**place, EGMF_SECRET=SECRET)
    rank = start(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = rank.communicate(timeout=200)[0]
    stranger.join(10)
    assert f"REFUSED rank 1: 'here/1' at 127.0.0.1:{port} is not from a process of this run" in text
    assert "another run or program writes there; start all ranks with the same EGMF_SECRET" in text
    assert "MET" not in text


@pytest.mark.distributed
def test_a_rank_without_the_secret_does_not_join() -> None:
    first, second = meet(SECRET, None, seconds=20)
    assert "REFUSED rank 1: 'here/1'" in first
    assert "it is not signed with the run's secret" in first
    assert "REFUSED 'here/verdict'" in second
    assert "a rank has EGMF_SECRET and this one does not" in second


@pytest.mark.parametrize("secret", [SECRET, None])
@pytest.mark.parametrize("value", [None, [], {"a": ["é", 1.5]}, "", 0])
def test_signed_messages_come_through(secret: str | None, value: object) -> None:
    store = SignedStore(dist.HashStore(), secret)
    store.put("key", value)
    assert store.get("key") == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"message": 1, "signature": 2}',
        b'{"message": "1", "signature": ""}',
        b'{"message": "1", "signature": null}',
        b'{"message": "1", "signature": "\xc3\xa9"}',
        b"[" * 100_000,
        b"1" * (LONGEST + 1),
    ],
)
def test_what_is_not_signed_is_refused(raw: bytes) -> None:
    store = dist.HashStore()
    store.set("key", raw)
    with pytest.raises(RendezvousError, match=r"'key' at .* is not from a process of this run"):
        SignedStore(store, SECRET).get("key")


def test_a_signature_holds_for_its_place_and_text() -> None:
    store = dist.HashStore()
    SignedStore(store, SECRET).put("here/0", "x")
    letter = store.get("here/0")
    store.set("here/1", letter)
    store.set("here/0", letter.replace(b"x", b"y"))
    for key in ("here/0", "here/1"):
        with pytest.raises(RendezvousError, match=r"not signed with the run's secret"):
            SignedStore(store, SECRET).get(key)
    SignedStore(store, "other").put("here/2", "x")
    with pytest.raises(RendezvousError, match=r"not signed with the run's secret"):
        SignedStore(store, SECRET).get("here/2")


def test_the_port_is_open_at_the_master_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every address only where the name means another address to other nodes, or is not this machine's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name in ("SLURM_PROCID", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cases = {"127.0.0.1": "127.0.0.1", "127.0.1.1": "127.0.1.1", "198.51.100.7": None}
    outer = next((a for a in _outer_addresses()), None)
    if outer is not None:
        cases[outer] = outer
    for master, place in cases.items():
        with _open_port(master, free_port()) as listener:
            assert listener.getsockname()[0] == (place or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.1.1", 0))])
    with _open_port("node1", free_port()) as listener:  # Debian's own name on the first of two nodes
        assert listener.getsockname()[0] in ("::", "0.0.0.0")


def _outer_addresses() -> list[str]:
    import psutil

    addresses = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    return [a for a in addresses if not a.startswith("127.")]


def test_a_port_in_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(RendezvousError, match=f"is in use.*process {os.getpid()}"),
    ):
        _open_port("127.0.0.1", taken.getsockname()[1])
