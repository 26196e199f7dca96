"""How the ranks of a run find each other: network interface, port, who is there; each fault is an error in time, not a hang.

The launchers set where rank 0 is (MASTER_ADDR, MASTER_PORT), not which interface leads there: gloo resolves the host's
name, which on many machines is 127.0.1.1, and NCCL guesses. So the interface is the one whose address the kernel would
use towards MASTER_ADDR. Before the process group is made, all ranks shake hands over its store, which needs one open port
only: absent ranks, other versions and interfaces that do not connect are listed by name.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict

import psutil
import torch.distributed as dist

from trainer.distributed.consistency import DISAGREE, Report, differences
from trainer.distributed.launcher import LOCAL_SIZES
from trainer.distributed.messages import format_faults, format_ranks
from trainer.distributed.versions import versions

log = logging.getLogger(__name__)

SECONDS = 300.0  # that each rank waits for the others, unless the config says otherwise
CONNECT = 5.0  # seconds for a connection between two ranks, and for a fault to be read before rank 0 leaves
LAST = "egmf/address of the last rank"
NOTICE = 15.0  # seconds after which the log says who is absent


class RendezvousError(ValueError):
    """The ranks of a run cannot find or reach each other."""


class Endpoint(TypedDict):
    """Where a rank can be reached; `address` and `port` are None where all ranks are on one machine."""

    host: str
    address: str | None
    port: int | None


class Introduction(Endpoint):
    """A rank's first message to rank 0."""

    rank: int
    versions: dict[str, str]


@contextlib.contextmanager
def rendezvous(seconds: float = SECONDS) -> Iterator[None]:
    """Find the interface, wait for all ranks, check that they fit and reach each other; inside, make the process group.

    Reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where they are unset
    and MASTER_ADDR is another machine's or this one's outer address.

    Raises:
        RendezvousError: on every rank that is there.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        yield
        return
    address = choose_interface()
    store = _store(rank, size, seconds)
    if several_nodes() and address is None:
        address = _interface_towards_last(store, size, seconds)
    elif rank == size - 1 and address is not None:
        store.set(LAST, address)
    with _listening(address) as port:
        own = Endpoint(host=socket.gethostname(), address=address, port=port)
        Handshake(store, rank, size).exchange(own, seconds)
    yield  # the store's server lives in rank 0 for as long as `store` does


def local_size() -> int | None:
    """The number of ranks on this machine, where the launcher says it."""
    return next((int(os.environ[name]) for name in LOCAL_SIZES if os.environ.get(name)), None)


def several_nodes() -> bool:
    """Whether the launcher's variables say that the ranks are on more than one node."""
    size, local = int(os.environ["WORLD_SIZE"]), local_size()
    nodes = (
        os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
        if "SLURM_PROCID" in os.environ
        else None
    )
    return local < size if local else int(nodes or 1) > 1


def choose_interface() -> str | None:
    """The address of this machine that the others reach; its interface is put into GLOO_ and NCCL_SOCKET_IFNAME.

    None, and nothing set, where MASTER_ADDR is a loopback address: all ranks are on this machine, or it is this
    machine's name for itself (Debian's 127.0.1.1) and only another node's address tells more.

    Raises:
        RendezvousError: MASTER_ADDR does not resolve, is written as a loopback address in a run of several nodes, or is
            not routed; an interface that was set is absent, down or a loopback.
    """
    master = os.environ["MASTER_ADDR"]
    try:
        towards = socket.getaddrinfo(master, None, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise RendezvousError(
            f"MASTER_ADDR={master} is not known on {socket.gethostname()} ({error.strerror}): "
            "give the first node's address, such as 10.0.0.1"
        ) from error
    address, several = str(towards[4][0]), several_nodes()
    loopback = ipaddress.ip_address(address).is_loopback
    if loopback and several and master in (address, "localhost"):
        raise RendezvousError(
            f"MASTER_ADDR={master} is every machine's own address, and this run has several nodes: give the first node's "
            f"that the others reach ({socket.gethostname()} has {_format_interfaces(_interfaces())})"
        )
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    if given:
        return _given_interface(given, _interfaces(), several)
    return None if loopback else _take_interface(address)


def _interface_towards_last(store: dist.Store, size: int, seconds: float) -> str | None:
    """On the first node, where its name means a loopback address: the interface towards the last rank's node."""
    try:
        store.wait([LAST], timedelta(seconds=seconds))
    except RuntimeError:  # the handshake reports who did not come
        return None
    address = store.get(LAST).decode()
    return _take_interface(address)


def _take_interface(peer: str) -> str:
    """The address that this machine sends from towards `peer`; its interface goes into the environment."""
    local = _local_address(peer)
    name = next((name for name, addresses in _interfaces().items() if local in addresses), None)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return local


def _local_address(peer: str) -> str:
    """Asks the kernel; nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError as error:
            raise RendezvousError(
                f"no route from {socket.gethostname()} to {peer} (MASTER_ADDR={os.environ['MASTER_ADDR']}): "
                f"{error.strerror}; its interfaces: {_format_interfaces(_interfaces())}"
            ) from error
        return str(probe.getsockname()[0])


def _given_interface(given: str, addresses_of: dict[str, list[str]], several: bool) -> str:
    """The first address of the interface that the user chose."""
    advice = f"it has {_format_interfaces(addresses_of)}; unset GLOO_SOCKET_IFNAME, and the one that leads to MASTER_ADDR is taken"
    for name in given.split(","):
        if name not in addresses_of:
            raise RendezvousError(
                f"GLOO_SOCKET_IFNAME={given}: {socket.gethostname()} has no interface {name} that is up; {advice}"
            )
        if several and any(ipaddress.ip_address(address).is_loopback for address in addresses_of[name]):
            raise RendezvousError(
                f"GLOO_SOCKET_IFNAME={given}: {name} is the loopback of {socket.gethostname()}, which no other node "
                f"reaches; {advice}"
            )
    return addresses_of[given.split(",")[0]][0]


def _interfaces() -> dict[str, list[str]]:
    """Interface -> its addresses, IPv4 first, of those that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        usable = [a for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6) and "fe80" not in a.address]
        usable.sort(key=lambda a: a.family != socket.AF_INET)
        if name in up and usable:
            found[name] = [a.address for a in usable]
    return found


def _format_interfaces(interfaces: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} ({addresses[0]})" for name, addresses in interfaces.items())


def _store(rank: int, size: int, seconds: float) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT; rank 0 opens it, unless torchrun's agent has."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        _check_free(port)
    else:
        _await_port(rank, address, port, seconds)
    made: list[dist.TCPStore | Exception] = []

    def connect() -> None:
        limit = timedelta(seconds=seconds)
        try:
            made.append(dist.TCPStore(address, port, size, serves, limit, wait_for_workers=False, multi_tenant=True))
        except RuntimeError as error:
            made.append(error)

    attempt = threading.Thread(target=connect, daemon=True)  # it has no time-out of its own towards another program
    attempt.start()
    attempt.join(seconds)
    if made and isinstance(made[0], dist.TCPStore):
        return made[0]
    raise RendezvousError(
        f"rank {rank} on {socket.gethostname()} cannot join the others at {address}:{port} within {seconds:g} s: "
        f"{made[0] if made else 'the port belongs to another program'}. Choose another port (MASTER_PORT, --master-port)"
    )


def _check_free(port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise RendezvousError(
                    f"port {port} of {socket.gethostname()} is in use{_holder(port)}: another run's, perhaps; choose "
                    "another (MASTER_PORT, --master-port), or end what holds it"
                ) from error
            raise RendezvousError(
                f"port {port} of {socket.gethostname()} cannot be opened: {error.strerror}; choose another MASTER_PORT"
            ) from error


def _holder(port: int) -> str:
    """Who listens at a port of this machine, as far as we may see."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def _await_port(rank: int, address: str, port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=CONNECT).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RendezvousError(
                    f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} within {seconds:g} s: "
                    f"{error.strerror or error}. Rank 0 did not start or has ended (see its output), or a firewall is "
                    "between; train.rendezvous_seconds=N waits longer"
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def _listening(address: str | None) -> Iterator[int | None]:
    """A port of this rank that another can try, at the address that the run will use."""
    if address is None:
        yield None
        return
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind((address, 0))
        listener.listen()
        yield int(listener.getsockname()[1])


class Handshake:
    """Two rounds over the store: each rank introduces itself, then tries the next node; rank 0 judges, and all raise its verdict."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = dist.PrefixStore("egmf/greeting", store), rank, size

    def exchange(self, own: Endpoint, seconds: float) -> None:
        """Publish this rank's endpoint and versions; then try to connect to the next rank's, if it is on another node.

        Raises:
            RendezvousError: on every rank that came.
        """
        until = time.monotonic() + seconds
        introduction: Introduction = {**own, "rank": self.rank, "versions": versions()}
        self._publish("here", introduction)
        self._judge("here", until, _version_faults)
        following: Introduction = self._read("here", (self.rank + 1) % self.size)
        fault = _unreachable(self.rank, own, following) if following["host"] != own["host"] else None
        self._publish("reach", {"fault": fault})
        self._judge("reach", time.monotonic() + seconds, lambda found: [x["fault"] for x in found if x["fault"]])

    def _publish(self, word: str, value: Mapping[str, object]) -> None:
        self.store.set(f"{word}/{self.rank}", json.dumps(value))

    def _read(self, word: str, rank: int) -> Any:
        return json.loads(self.store.get(f"{word}/{rank}"))

    def _judge(self, word: str, until: float, faults_of: Callable[[list[Any]], list[str]]) -> None:
        """Rank 0 waits for all and publishes what is wrong, or nothing; every rank raises it."""
        present = 0
        if self.rank == 0:
            absent = self._absent(word, until)
            found = [self._read(word, r) for r in range(self.size) if r not in absent]
            present = len(found)
            faults = [self._absence(absent, found)] if absent else faults_of(found)
            self.store.set(f"{word}/verdict", "\n".join(faults))
        else:
            left = max(1.0, until - time.monotonic()) + 2 * CONNECT
            try:
                self.store.wait([f"{word}/verdict"], timedelta(seconds=left))
            except RuntimeError as error:
                raise RendezvousError(f"rank 0 left during the rendezvous (see its output): {error}") from error
        verdict = self.store.get(f"{word}/verdict").decode()
        if verdict:
            self._wait_for_readers(word, present)
            raise RendezvousError(verdict)

    def _wait_for_readers(self, word: str, readers: int) -> None:
        """Rank 0 holds the store: it leaves when the others have read what is wrong."""
        until = time.monotonic() + CONNECT
        read = self.store.add(f"{word}/read", 1)
        while read < readers and time.monotonic() < until:
            time.sleep(0.1)
            read = self.store.add(f"{word}/read", 0)

    def _absent(self, word: str, until: float) -> list[int]:
        """Ranks that have not published `word` in time; after a while the log says once who they are."""
        absent, notice = list(range(self.size)), time.monotonic() + NOTICE
        while absent:
            absent = [rank for rank in absent if not self.store.check([f"{word}/{rank}"])]
            if not absent or time.monotonic() > until:
                break
            if time.monotonic() > notice:
                log.info("waiting for %s of %d", format_ranks(absent), self.size)
                notice = float("inf")
            time.sleep(0.1)
        return absent

    def _absence(self, absent: Sequence[int], found: Sequence[Mapping[str, object]]) -> str:
        hosts = ", ".join(dict.fromkeys(str(x.get("host")) for x in found if x.get("host"))) or "none"
        return (
            f"{format_ranks(absent)} of {self.size} did not come in time; the others are on {hosts}. See the absent "
            "ranks' own output: their node is down or slow, or a launcher was given another number of processes; "
            "train.rendezvous_seconds=N waits longer"
        )


def _version_faults(found: Sequence[Introduction]) -> list[str]:
    reports = [Report(where=f"rank {x['rank']} on {x['host']}", versions=x["versions"]) for x in found]
    faults = differences(reports)
    return [format_faults(faults, DISAGREE)] if faults else []


def _unreachable(rank: int, own: Endpoint, following: Endpoint) -> str | None:
    """Why rank + 1 cannot be reached at the address it gave, from the address of this one; None if it can."""
    if own["address"] is None or following["address"] is None:
        return None
    try:
        place = (following["address"], following["port"])
        socket.create_connection(place, timeout=CONNECT, source_address=(own["address"], 0)).close()
    except OSError as error:
        return (
            f"rank {rank} on {own['host']} ({own['address']}) cannot reach {following['host']} at {following['address']}: "
            f"{error.strerror or error}. One of the two uses an interface that does not lead to the other: unset "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or name the right one; or a firewall is between"
        )
    return None
