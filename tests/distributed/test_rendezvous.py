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
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launch.start import demo
from tests.distributed.processes import ROOT, environment, free_port, start
from trainer.distributed import versions
from trainer.distributed.handshake import (
    LONGEST,
    Endpoint,
    Handshake,
    Introduction,
    RendezvousError,
    SignedStore,
    _shared_gpus,
)
from trainer.distributed.launcher import EGMF_SECRET
from trainer.distributed.process_group import choose_device, gpu_identity
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
    letter = json.dumps({"host": "x", "address": None, "port": None, "gpu": None, "rank": 1, "versions": {}})
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


def introduction(rank: int, host: str, gpu: str | None) -> Introduction:
    return {"rank": rank, "host": host, "gpu": gpu, "address": None, "port": None, "versions": {}}


def test_ranks_that_share_a_gpu_are_named_with_the_numbers() -> None:
    alone = [
        introduction(0, "a", "u0"),
        introduction(1, "a", "u1"),
        introduction(2, "b", "u0"),
        introduction(3, "b", None),
    ]
    assert _shared_gpus(alone) == []
    assert _shared_gpus([introduction(r, "a", None) for r in range(4)]) == []
    shared = [introduction(r, "a", f"u{r % 2}") for r in range(4)] + [
        introduction(4 + r, "b", f"u{r}") for r in range(2)
    ]
    (fault,) = _shared_gpus(shared)
    assert fault.startswith(
        "ranks 0, 2 and ranks 1, 3 share a GPU: 4 ranks on a use 2 GPUs. Start one process per GPU (2 here:"
    )


@pytest.mark.parametrize(
    ("seen", "local", "index"), [(4, "3", 3), (1, "3", 0), (1, None, 0), (2, "1", 1), (8, "0", 0), (2, "3", 1)]
)
def test_a_rank_takes_the_gpu_of_its_place_or_the_only_one(
    monkeypatch: pytest.MonkeyPatch, seen: int, local: str | None, index: int
) -> None:
    """DeepSpeed reads LOCAL_RANK by itself: where a Slurm task sees its own GPU alone, that is not its place on the node."""
    chosen: list[int] = []
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if local is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert choose_device() == torch.device("cuda", index)
    assert chosen == [index]
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it makes a plan for every new shape
    assert os.environ["LOCAL_RANK"] == str(index)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):  # what the user set stays
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:64")
        choose_device()
        assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if "CUDA" in name else "max_split_size_mb:64")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_identity(choose_device()) == "u"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert gpu_identity(choose_device()) == "u MIG-1"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert gpu_identity(choose_device()) is None


def test_the_allocators_settings_are_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert versions.environment()["allocator"] is None
    for value, name in enumerate(
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    ):  # the later is what torch reads first
        monkeypatch.setenv(name, f"max_split_size_mb:{value}")
        assert versions.environment()["allocator"] == f"max_split_size_mb:{value}"


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_starts_no_more_processes_than_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(demo, "GPU_DEVICES", ("/dev/no-such-gpu", "/dev/null"))
    assert demo.usual_processes() == processes
    monkeypatch.setattr(demo, "GPU_DEVICES", ("/dev/no-such-gpu",))
    assert demo.usual_processes() == 2


def test_both_ranks_of_a_shared_gpu_are_told() -> None:
    store, told = dist.HashStore(), {}

    def meet_as(rank: int) -> None:
        try:
            Handshake(store, rank, 2, SECRET).exchange(Endpoint(host="a", address=None, port=None, gpu="u"), 20)
        except RendezvousError as error:
            told[rank] = str(error)

    ranks = [threading.Thread(target=meet_as, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert sorted(told) == [0, 1]
    for text in told.values():
        assert "ranks 0-1 share a GPU: 2 ranks on a use 1 GPU. Start one process per GPU (1 here:" in text
