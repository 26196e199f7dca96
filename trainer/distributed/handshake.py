"""The handshake of a run's ranks over their store: who is there, do they fit, do they reach each other; signed where there is a secret.

The store knows no authentication: whoever reaches its port can read and write it. A launcher therefore gives all ranks of a
run a secret (``EGMF_SECRET``), and each message of the handshake carries HMAC-SHA256(secret, key + line feed + message).
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict

import torch.distributed as dist

from trainer.distributed.consistency import DISAGREE, Report, differences
from trainer.distributed.launcher import EGMF_SECRET
from trainer.distributed.messages import format_faults, format_ranks
from trainer.distributed.versions import versions

log = logging.getLogger(__name__)

CONNECT = 5.0  # seconds for a connection between two ranks, and for a fault to be read before rank 0 leaves
NOTICE = 15.0  # seconds after which the log says who is absent
LONGEST = 1 << 20  # bytes of a message


class RendezvousError(ValueError):
    """The ranks of a run cannot find or reach each other."""


class Endpoint(TypedDict):
    """Where a rank is and can be reached; `address` and `port` are None where all ranks are on one machine, `gpu` on a CPU."""

    host: str
    address: str | None
    port: int | None
    gpu: str | None


class Introduction(Endpoint):
    """A rank's first message to rank 0."""

    rank: int
    versions: dict[str, str]


class SignedStore:
    """Messages in a store, signed with the run's secret; without one they are as they come.

    Args:
        secret: of the run, None for none.
    """

    def __init__(self, store: dist.Store, secret: str | None) -> None:
        self.store, self._secret = store, secret

    def put(self, key: str, value: object) -> None:
        text = json.dumps(value)
        self.store.set(key, json.dumps({"message": text, "signature": self._signature(key, text)}))

    def get(self, key: str) -> Any:
        """The message at a key, waited for.

        Raises:
            RendezvousError: it is not one of this run's ranks'.
        """
        raw = self.store.get(key)
        fault = RendezvousError(f"{key!r} at {_place()} is not from a process of this run: {self._cause()}")
        try:
            if len(raw) > LONGEST:
                raise fault
            letter = json.loads(raw)
            text, signature = letter["message"], letter["signature"]
            genuine = hmac.compare_digest(self._signature(key, text), signature)
            value = json.loads(text) if genuine else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise fault from error
        if not genuine:
            raise fault
        return value

    def _signature(self, key: str, text: str) -> str:
        if self._secret is None:
            return ""
        return hmac.new(self._secret.encode(), f"{key}\n{text}".encode(), "sha256").hexdigest()

    def _cause(self) -> str:
        advice = f"start all ranks with the same {EGMF_SECRET}, or with none; or choose another port (MASTER_PORT, --master-port)"
        if self._secret is None:
            return f"another program writes there, or a rank has {EGMF_SECRET} and this one does not; {advice}"
        return f"it is not signed with the run's secret; another run or program writes there; {advice}"


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


class Handshake:
    """Two rounds over the store: each rank introduces itself, then tries the next node; rank 0 judges, and all raise its verdict."""

    def __init__(self, store: dist.Store, rank: int, size: int, secret: str | None = None) -> None:
        self.store, self.rank, self.size = dist.PrefixStore("egmf/greeting", store), rank, size
        self.signed = SignedStore(self.store, secret)

    def exchange(self, own: Endpoint, seconds: float) -> None:
        """Publish this rank's endpoint and versions; then try to connect to the next rank's, if it is on another node.

        Raises:
            RendezvousError: on every rank that came.
        """
        until = time.monotonic() + seconds
        introduction: Introduction = {**own, "rank": self.rank, "versions": versions()}
        self._publish("here", introduction)
        self._judge("here", until, _faults_of)
        following: Introduction = self._read("here", (self.rank + 1) % self.size)
        fault = _unreachable(self.rank, own, following) if following["host"] != own["host"] else None
        self._publish("reach", {"fault": fault})
        self._judge("reach", time.monotonic() + seconds, lambda found: [x["fault"] for x in found if x["fault"]])

    def _publish(self, word: str, value: Mapping[str, object]) -> None:
        self.signed.put(f"{word}/{self.rank}", value)

    def _read(self, word: str, rank: int) -> Any:
        return self.signed.get(f"{word}/{rank}")

    def _judge(self, word: str, until: float, faults_of: Callable[[list[Any]], list[str]]) -> None:
        """Rank 0 waits for all and publishes what is wrong, or nothing; every rank raises it."""
        present = 0
        if self.rank == 0:
            absent = self._absent(word, until)
            found, strange = self._read_all(word, [r for r in range(self.size) if r not in absent])
            present = self.size - len(absent)
            faults = strange or ([self._absence(absent, found)] if absent else faults_of(found))
            self.signed.put(f"{word}/verdict", "\n".join(faults))
        else:
            left = max(1.0, until - time.monotonic()) + 2 * CONNECT
            try:
                self.store.wait([f"{word}/verdict"], timedelta(seconds=left))
            except RuntimeError as error:
                raise RendezvousError(f"rank 0 left during the rendezvous (see its output): {error}") from error
        verdict = self.signed.get(f"{word}/verdict")
        if verdict:
            self._wait_for_readers(word, present)
            raise RendezvousError(verdict)

    def _read_all(self, word: str, ranks: Sequence[int]) -> tuple[list[Any], list[str]]:
        """What these ranks published, and a fault for each that somebody else did."""
        found, strange = [], []
        for rank in ranks:
            try:
                found.append(self._read(word, rank))
            except RendezvousError as error:
                strange.append(f"rank {rank}: {error}")
        return found, strange

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


def _faults_of(found: Sequence[Introduction]) -> list[str]:
    return _version_faults(found) + _shared_gpus(found)


def _shared_gpus(found: Sequence[Introduction]) -> list[str]:
    """A fault for each machine on which several ranks use one GPU, which NCCL cannot."""
    ranks: dict[str, dict[str, list[int]]] = {}
    for one in found:
        if one["gpu"] is not None:
            ranks.setdefault(one["host"], {}).setdefault(one["gpu"], []).append(one["rank"])
    faults = []
    for host, of_gpu in ranks.items():
        shared = [some for some in of_gpu.values() if len(some) > 1]
        if shared:
            n, gpus = sum(map(len, of_gpu.values())), len(of_gpu)
            faults.append(
                f"{' and '.join(map(format_ranks, shared))} share a GPU: {n} ranks on {host} use {gpus} GPU{'s' if gpus > 1 else ''}. Start one "
                f"process per GPU ({gpus} here: --procs, --nproc-per-node, slots=, --ntasks-per-node), or show the ranks more of them "
                "(CUDA_VISIBLE_DEVICES, --gpus-per-node)"
            )
    return faults


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
