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
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import psutil
import torch.distributed as dist

from trainer.distributed.handshake import CONNECT, Endpoint, Handshake, RendezvousError, SignedStore
from trainer.distributed.launcher import EGMF_SECRET, LOCAL_SIZES

SECONDS = 300.0  # that each rank waits for the others, unless the config says otherwise
LAST = "egmf/address of the last rank"


@contextlib.contextmanager
def rendezvous(seconds: float = SECONDS, gpu: str | None = None) -> Iterator[None]:
    """Find the interface, wait for all ranks, check that they fit and reach each other; inside, make the process group.

    Reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, EGMF_SECRET; sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where they are
    unset: the loopback's where all ranks are on this machine. `gpu` tells this rank's GPU from the others of its machine.

    Raises:
        RendezvousError: on every rank that is there.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        yield
        return
    secret = os.environ.get(EGMF_SECRET) or None
    address = choose_interface()
    store = _store(rank, size, seconds)
    signed = SignedStore(store, secret)
    if several_nodes() and address is None:
        address = _interface_towards_last(signed, size, seconds)
    elif rank == size - 1 and address is not None:
        signed.put(LAST, address)
    with _listening(address) as port:
        own = Endpoint(host=socket.gethostname(), address=address, port=port, gpu=gpu)
        Handshake(store, rank, size, secret).exchange(own, seconds)
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

    None where MASTER_ADDR is a loopback address: all ranks are on this machine, and the loopback is taken; or it is this
    machine's name for itself (Debian's 127.0.1.1), only another node's address tells more, and nothing is set.

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
    if not loopback:
        return _take_interface(address)
    if _alone(master, address):
        _take_interface(address)
    return None


def _alone(master: str, address: str) -> bool:
    """Whether all ranks are on this machine: MASTER_ADDR, written so, is every machine's own, or the launcher says it."""
    return master in (address, "localhost") or local_size() == int(os.environ["WORLD_SIZE"])


def _interface_towards_last(signed: SignedStore, size: int, seconds: float) -> str | None:
    """On the first node, where its name means a loopback address: the interface towards the last rank's node."""
    try:
        signed.store.wait([LAST], timedelta(seconds=seconds))
    except RuntimeError:  # the handshake reports who did not come
        return None
    return _take_interface(str(signed.get(LAST)))


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
    listener = _open_port(address, port) if serves else None
    if listener is None:
        _await_port(rank, address, port, seconds)
    made: list[dist.TCPStore | Exception] = []

    def connect() -> None:
        limit = timedelta(seconds=seconds)
        fd = listener.detach() if listener else None
        try:
            made.append(
                dist.TCPStore(
                    address, port, size, serves, limit, wait_for_workers=False, multi_tenant=True, master_listen_fd=fd
                )
            )
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


def _open_port(master: str, port: int) -> socket.socket:
    """Rank 0's port, listening at MASTER_ADDR alone; at every address where this machine's own is not known by that name."""
    place = _own_address(master)
    family = socket.AF_INET6 if ":" in place or (not place and socket.has_dualstack_ipv6()) else socket.AF_INET
    try:
        return socket.create_server(
            (place, port), family=family, backlog=2048, dualstack_ipv6=not place and family == socket.AF_INET6
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RendezvousError(
                f"port {port} of {socket.gethostname()} is in use{_holder(port)}: another run's, perhaps; choose "
                "another (MASTER_PORT, --master-port), or end what holds it"
            ) from error
        raise RendezvousError(
            f"port {port} of {socket.gethostname()} cannot be opened: {error.strerror}; choose another MASTER_PORT"
        ) from error


def _own_address(master: str) -> str:
    """The address of this machine that MASTER_ADDR means to all ranks; empty where it means another to others."""
    address = str(socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)[0][4][0])
    if ipaddress.ip_address(address).is_loopback:
        return address if _alone(master, address) else ""
    return address if any(address in addresses for addresses in _interfaces().values()) else ""


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
