"""Several machines over ssh: the nodes are checked together, then each gets an agent that starts its part of the run.

Why an agent of ours (:mod:`launch.start.agent`) and not DeepSpeed's runner over pdsh: that one answers a stop signal with a
`pkill -f` on every host, which also ends other people's runs of the same interpreter; it exits 0 when its own helper is
killed; it writes environment variables, tokens included, into a command line that all users of a node can read; and it
cannot say which rank failed first, and why. `deepspeed --hostfile` itself gives the same run for those who prefer it.

The connection is the leash: an agent whose launcher is gone, or silent for `launch.start.agent.SILENCE` seconds, stops its
workers, so nothing outlives the run.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import os
import queue
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from launch.start.agent import BEAT, MARK, verdict_of
from launch.start.local import PATIENCE, STOPPED, Part, passing_signals, run_state
from trainer.distributed.consistency import Report, differences
from trainer.distributed.messages import format_faults, join_truncated

SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=5",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=4",
)
CHECK = 120.0  # seconds for a node to describe itself: it imports torch, perhaps over a slow network file system
DEFAULT_PORT = 29500  # DeepSpeed's and torchrun's too
ENDING = 60.0  # seconds that agents have to end their workers when told to
# environment variables that reach the nodes, by the beginning of their names; CUDA_VISIBLE_DEVICES is each node's own
FORWARDED = (
    "AWS_", "CUDA_HOME", "DEEPSPEED_", "DS_", "EGMF", "GLOO_", "HF_", "HTTPS_PROXY", "HTTP_PROXY", "HUGGINGFACE", "KMP_",
    "LANG", "LC_", "LD_LIBRARY_PATH", "MASTER_PORT", "MKL_", "MLFLOW", "NCCL_", "NO_PROXY", "OMP_", "PATH", "PYTHON",
    "PYTORCH_", "REQUESTS_CA_BUNDLE", "SSL_CERT", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "UCX", "VIRTUAL_ENV",
    "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a name that ssh knows, and how many processes run there."""

    name: str
    slots: int


@dataclass(frozen=True)
class LaunchPlan:
    """What is started where."""

    hosts: tuple[Host, ...]
    line: tuple[str, ...]  # the command of every process
    out: Path
    address: str | None = None  # of rank 0; None: found when the nodes are checked
    port: int | None = None

    def parts(self) -> list[Part]:
        """Each node's ranks."""
        world = sum(host.slots for host in self.hosts)
        firsts = itertools.accumulate((host.slots for host in self.hosts), initial=0)
        place = (self.address or "", self.port or 0)
        return [
            Part(self.line, first, host.slots, world, *place) for first, host in zip(firsts, self.hosts, strict=False)
        ]


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """DeepSpeed's format: a line ``name slots=N`` for every node; rank 0 is on the first; # begins a comment.

    Raises:
        ValueError: with every fault of the file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, Host] = {}
    faults = []
    for number, text in enumerate(lines, 1):
        text = text.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([^\s-]\S*)\s+slots=([1-9]\d*)", text)
        if match is None:
            faults.append(f"line {number}: {text!r} is not of the form 'name slots=N' with N of 1 or more")
        elif match[1] in hosts:
            faults.append(f"line {number}: {match[1]} stands there twice")
        else:
            hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts and not faults:
        faults.append("it names no node: write a line 'name slots=N' for each")
    if faults:
        raise ValueError(format_faults(faults, f"hostfile {path}"))
    return tuple(hosts.values())


def environment(extra: Sequence[str] = ()) -> dict[str, str]:
    """The variables of this process that the nodes get, those named in `extra` too.

    Raises:
        ValueError: one of `extra` is not set.
    """
    absent = [name for name in extra if name not in os.environ]
    if absent:
        raise ValueError(f"--env names what is not set here: {', '.join(absent)}")
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED) or name in extra}


def check(hosts: Sequence[Host], config: Path, overrides: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Every node's own report (:mod:`launch.start.nodes`), asked for in parallel over ssh.

    Raises:
        ValueError: nodes that cannot be reached, differ, lack data, model or run folder, or have fewer GPUs than slots:
            all of them in one message.
    """
    token = f".seen-{secrets.token_hex(8)}"
    line = ["-m", "launch.start.nodes", str(config), "--out", str(out), "--token", token, *overrides]
    mark = out / token
    with contextlib.suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        with ThreadPoolExecutor(max_workers=min(256, len(hosts))) as pool:
            reports = list(pool.map(lambda host: _ask(host, line), hosts))
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    faults = differences(cast(list[Report], reports))
    for host, told in zip(hosts, reports, strict=True):
        if told.get("gpus") and len(told["gpus"]) < host.slots:
            faults.append(f"{host.name} has {len(told['gpus'])} GPUs and slots={host.slots} in the hostfile")
    devices = {bool(told["gpus"]): host.name for host, told in zip(hosts, reports, strict=True) if "gpus" in told}
    if len(devices) > 1:
        faults.append(f"{devices[True]} has GPUs, {devices[False]} has none")
    sees = {
        host.name: told["run_folder"]["sees_token"]
        for host, told in zip(hosts, reports, strict=True)
        if "run_folder" in told
    }
    if any(sees.values()) and not all(sees.values()):
        blind = join_truncated([name for name, seen in sees.items() if not seen])
        faults.append(
            f"the run folder {out.resolve()} is not shared: {blind} sees another; choose --out on shared storage"
        )
    if faults:
        raise ValueError(format_faults(faults, "the nodes are not ready"))
    return reports


def _ask(host: Host, line: Sequence[str]) -> dict[str, Any]:
    """A node's report under its name in the hostfile; what keeps it from answering is its fault."""
    command = [*SSH, host.name, remote([sys.executable, *line])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK, stdin=subprocess.DEVNULL)
        told = json.loads(done.stdout.splitlines()[-1])
        return {**told, "where": host.name}
    except subprocess.TimeoutExpired:
        fault = f"does not answer within {CHECK:g} s"
    except OSError as error:
        fault = f"cannot be asked: {error}"
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fault = f"cannot be reached over ssh: {last}" if done.returncode == 255 else f"cannot describe itself: {last}"
    return {"where": host.name, "faults": {"node": fault}}


def remote(line: Sequence[str]) -> str:
    """A command for the other side's shell: in this folder, with this Python path."""
    path = os.environ.get("PYTHONPATH")
    setting = f"env PYTHONPATH={shlex.quote(path)} " if path else ""
    return f"cd {shlex.quote(os.getcwd())} && exec {setting}{shlex.join(line)}"


def master_address(reports: Sequence[dict[str, Any]]) -> str:
    """The first node's address that the others can use: where ssh reached it, else one in a network that others have.

    Raises:
        ValueError: it has none.
    """
    first, *others = reports
    if first.get("reached_at"):
        return str(first["reached_at"])
    own = [ipaddress.ip_interface(text) for held in first["addresses"].values() for text in held]
    there = [ipaddress.ip_interface(text) for told in others for held in told["addresses"].values() for text in held]
    shared = [a for a in own if any(a.network == b.network and a.ip != b.ip for b in there)]
    chosen = next(iter([*shared, *own]), None)
    if chosen is None:
        raise ValueError(f"{first['where']} has no address but its loopback: give one with --master-addr")
    return str(chosen.ip)


def placed(plan: LaunchPlan, reports: Sequence[dict[str, Any]]) -> LaunchPlan:
    """The plan with rank 0's address and port, from the nodes' reports where they were not given."""
    return replace(
        plan,
        address=plan.address or master_address(reports),
        port=plan.port or int(reports[0]["free_port"]),
    )


def own_part(plan: LaunchPlan, number: int | None) -> Part:
    """The ranks of node `number`, for a start without ssh.

    Raises:
        ValueError: the number or the first node's address is missing, or there is no such node.
    """
    faults = []
    if number is None or number >= len(plan.hosts):
        faults.append(f"--node-rank is this node's line in the hostfile, 0 to {len(plan.hosts) - 1}; given: {number}")
    if plan.address is None:
        faults.append("--master-addr is missing: the first node's address that all others reach")
    if faults or number is None:
        raise ValueError(format_faults(faults, "--no-ssh"))
    return replace(plan, port=plan.port or DEFAULT_PORT).parts()[number]


def shown(parts: Sequence[Part], plan: LaunchPlan, env: dict[str, str]) -> str:
    """What will be done, for people."""
    lines = []
    for part in parts:
        firsts = itertools.accumulate((host.slots for host in plan.hosts), initial=0)
        name = plan.hosts[list(firsts).index(part.first)].name
        last = part.first + part.slots - 1
        ranks = f"rank {part.first}" if part.slots == 1 else f"ranks {part.first}-{last}"
        lines.append(f"{name}: {ranks} of {part.world}: {shlex.join(part.line)}")
    place = f"{parts[0].address or f'an address of {plan.hosts[0].name}'}, port {parts[0].port or 'free there'}"
    lines.append(f"rank 0 is met at {place}")
    if env:
        lines.append(f"over {shlex.join(SSH)} NODE, in {os.getcwd()}; environment: {', '.join(sorted(env))}")
    return "\n".join(lines)


class Agents:
    """The agents of all nodes, over one ssh connection each."""

    def __init__(self, plan: LaunchPlan, env: dict[str, str]) -> None:
        self.plan = plan
        self.verdicts: dict[int, dict[str, Any]] = {}
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._connections = [self._connect(number, env) for number in range(len(plan.hosts))]
        threading.Thread(target=self._beat, daemon=True).start()

    def _connect(self, number: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [*SSH, self.plan.hosts[number].name, remote([sys.executable, "-m", "launch.start.agent"])]
        connection = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self._tell(
            connection, json.dumps({"part": asdict(self.plan.parts()[number]), "env": env, "out": str(self.plan.out)})
        )
        threading.Thread(target=self._listen, args=(number, connection), daemon=True).start()
        return connection

    def _listen(self, number: int, connection: subprocess.Popen[bytes]) -> None:
        assert connection.stderr is not None
        for raw in connection.stderr:
            line = raw.decode(errors="replace")
            verdict = verdict_of(line)
            if verdict is not None:
                self.verdicts[number] = verdict
                line = line.partition(MARK)[0]
            sys.stderr.write(line)
        self._ended.put((number, connection.wait()))

    def _beat(self) -> None:
        """Tell the agents that we are there; an agent that hears nothing for long stops."""
        while not self._over.wait(BEAT):
            for connection in self._connections:
                self._tell(connection, "")

    def _tell(self, connection: subprocess.Popen[bytes], word: str) -> None:
        assert connection.stdin is not None
        left = f"{word}\n".encode()
        with contextlib.suppress(OSError):  # it has ended: that is told by its exit code
            while left:  # unbuffered: signal handlers and threads speak here
                left = left[os.write(connection.stdin.fileno(), left) :]

    def signal(self, number: int) -> None:
        """Pass a signal to every worker of every node."""
        for connection in self._connections:
            self._tell(connection, signal.Signals(number).name)

    def wait(self) -> None:
        """Until all have ended; when a node fails, the others get time to notice, and are then ended."""
        left = len(self._connections)
        until: float | None = None
        told = False
        while left:
            try:
                number, code = self._ended.get(timeout=0.5)
            except queue.Empty:
                if until is not None and time.monotonic() > until and not told:
                    self._let_go()
                    told, until = True, time.monotonic() + ENDING
                elif until is not None and time.monotonic() > until:
                    self._cut()
                continue
            left -= 1
            verdict = self.verdicts.setdefault(number, {"code": code, "lost": True})
            if verdict["code"] not in (0, STOPPED) and until is None:
                until = time.monotonic() + PATIENCE + 5
        self._over.set()

    def _let_go(self) -> None:
        for connection in self._connections:
            self._tell(connection, "END")

    def _cut(self) -> None:
        for connection in self._connections:
            if connection.poll() is None:
                connection.kill()

    def close(self) -> None:
        """Cut what is still connected: its agents end their workers."""
        self._over.set()
        self._cut()


def launch(plan: LaunchPlan, env: dict[str, str]) -> int:
    """Run the plan to its end; see :func:`launch.start.local.launch` for what it returns.

    SIGINT, SIGTERM and SIGHUP (as SIGTERM) reach every worker: the run stops at one step, saves, and 85 is returned.
    """
    before = run_state(plan.out)
    agents = Agents(plan, env)
    with contextlib.closing(agents), passing_signals(agents.signal):
        agents.wait()
    return conclude(plan, agents.verdicts, before)


def conclude(plan: LaunchPlan, verdicts: dict[int, dict[str, Any]], before: tuple[str | None, str | None]) -> int:
    """The exit code, from how each node ended and what the run's record says (`before`: said when it was started)."""
    failed = {n: v for n, v in verdicts.items() if v["code"] not in (0, STOPPED)}
    state = run_state(plan.out)
    if failed:
        number = next(
            (n for n, v in failed.items() if not v.get("follows")), next(iter(failed))
        )  # in order of their ends
        verdict, name = failed[number], plan.hosts[number].name
        if state != before and state[0] == "stopped":
            sys.stderr.write(
                f"{_lost(name, verdict)}; the other processes saved and stopped: the same command continues\n"
            )
            return STOPPED
        why = verdict.get("told") or f"the run failed: {_lost(name, verdict)}"
        sys.stderr.write(f"node {name}: {why}\n")
        return int(verdict["code"]) if 0 < int(verdict["code"]) < 255 else 1
    if any(verdict["code"] == STOPPED for verdict in verdicts.values()):
        return STOPPED
    if state[0] != "done":
        sys.stderr.write(f"the processes ended, but {plan.out / 'run.json'} says {state[0]!r} and not 'done'\n")
        return 1
    return 0


def _lost(name: str, verdict: dict[str, Any]) -> str:
    how = "the connection was lost" if verdict["code"] == 255 else f"its agent ended with code {verdict['code']}"
    return f"{name}: {how} before it said how its processes ended"
