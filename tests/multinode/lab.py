"""Nodes on one machine: each a network namespace with its own address, host name, processes, /dev/shm and sshd.

What is false on a cluster is false here: another node's 127.0.0.1, its process ids, its interfaces. As on Debian, a node's
own name means 127.0.1.1 to itself. The file system is shared, like a cluster's; :meth:`Node.hide` takes a folder away on
one node. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.start.local import die_with_parent
from tests.distributed.processes import ROOT, install_packages

NET = "10.81.0"
BRIDGE = "egmfhbr"
PACKAGES = {"sshd": "openssh-server", "pdsh": "pdsh", "ip": "iproute2"}
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"


class Node:
    """One node; `pid` is the first process of its namespaces."""

    def __init__(self, number: int, lab: Path) -> None:
        self.number, self.lab = number, lab
        self.name, self.address, self.space = f"node{number}", f"{NET}.{number}", f"egmfh{number}"
        self._start()

    def _start(self) -> None:
        _run("ip", "netns", "add", self.space)
        _run("ip", "link", "add", f"egmfhv{self.number}", "type", "veth", "peer", "name", "eth0", "netns", self.space)
        _run("ip", "link", "set", f"egmfhv{self.number}", "master", BRIDGE, "up")
        _run("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            _run("ip", "-n", self.space, "link", "set", link, "up")
        # an address that every node has and that leads nowhere, as docker0 has
        _run("ip", "-n", self.space, "link", "add", "docker0", "type", "veth", "peer", "name", "docker1")
        _run("ip", "-n", self.space, "addr", "add", "172.30.0.1/16", "dev", "docker0")
        for link in ("docker0", "docker1"):
            _run("ip", "-n", self.space, "link", "set", link, "up")
        others = "\n".join(f"{NET}.{n} node{n}" for n in (1, 2) if n != self.number)
        (self.lab / f"hosts{self.number}").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{others}\n")
        (self.lab / f"sshd{self.number}").write_text(
            f"Port 22\nListenAddress {self.address}\nHostKey {self.lab}/hostkey\nAuthorizedKeysFile {self.lab}/key.pub\n"
            f"PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
        inside = (
            f"hostname {self.name} && mount --bind {self.lab}/hosts{self.number} /etc/hosts && "
            "mount -t tmpfs none /dev/shm && mkdir -p /run/sshd && "
            f"exec /usr/sbin/sshd -D -e -f {self.lab}/sshd{self.number}"
        )
        parent = os.getpid()
        self._first = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.space}", "unshare", "--mount", "--uts", "--pid", "--fork",
             "--kill-child", "--mount-proc", "sh", "-c", inside],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(self.lab / f"sshd{self.number}.log").open("w"),
            preexec_fn=lambda: die_with_parent(parent),
        )  # fmt: skip
        self.pid = int(_eventually(lambda: _children(self._first.pid))[0])

    def start(self, command: Sequence[str], env: dict[str, str], **more: Any) -> subprocess.Popen[str]:
        """Start `command` on this node; :func:`inner` is its process."""
        entered = ["nsenter", "-t", str(self.pid), "-m", "-n", "-u", "-p", f"--wd={ROOT}", *command]
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, **more}
        return subprocess.Popen(entered, env=env, cwd=ROOT, text=True, **more)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on this node to its end."""
        started = self.start(command, {**os.environ, **env}, stderr=subprocess.PIPE)
        out, err = started.communicate(timeout=120)
        return subprocess.CompletedProcess(command, started.returncode, out, err)

    def processes(self) -> dict[int, str]:
        """Process id (of this machine) -> command, of this node's processes other than its sshd's listener."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if line and os.readlink(folder / "ns/pid") == space and int(folder.name) != self.pid:
                    found[int(folder.name)] = line
        return found

    def workers(self) -> dict[int, str]:
        """The training processes among them, by rank in their environment."""
        found = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                variables = dict(
                    x.partition("=")[::2] for x in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                )
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if "RANK" in variables and b"train" in line:
                    found[pid] = variables["RANK"]
        return found

    def left_behind(self) -> dict[str, Any]:
        """What a run that ended must not leave: processes, shared memory, listening ports (beside sshd's)."""
        shared = [path.name for path in Path(f"/proc/{self.pid}/root/dev/shm").iterdir()]
        listening = [
            line.split()[1]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and not line.split()[1].endswith(":0016")
        ]
        found = {"processes": list(self.processes().values()), "shared memory": shared, "ports": listening}
        return {what: remains for what, remains in found.items() if remains}

    @contextlib.contextmanager
    def hide(self, folder: Path) -> Iterator[None]:
        """On this node `folder` is empty inside the block."""
        enter = ("nsenter", "-t", str(self.pid), "-m", "-p")
        _run(*enter, "mount", "-t", "tmpfs", "none", str(folder))
        try:
            yield
        finally:
            _run(*enter, "umount", "-l", str(folder))

    @contextlib.contextmanager
    def replace(self, file: Path, text: str) -> Iterator[None]:
        """On this node `file` holds `text` inside the block."""
        other = self.lab / f"replaced-{self.name}"
        other.write_text(text)
        enter = ("nsenter", "-t", str(self.pid), "-m", "-p")
        _run(*enter, "mount", "--bind", str(other), str(file))
        try:
            yield
        finally:
            _run(*enter, "umount", "-l", str(file))

    def stop(self) -> None:
        """End every process of the node (its first one takes them along), and its network."""
        if self._first.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 9)
            self._first.wait(timeout=30)
        subprocess.run(["ip", "netns", "del", self.space], env={"PATH": SBIN}, capture_output=True)


@contextlib.contextmanager
def nodes(lab: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other by ssh without a password, removed at the end. `lab` is an empty folder."""
    for name in ("key", "hostkey"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(lab / name))
    (lab / "bin").mkdir()
    wrapper = lab / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {lab}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    (lab / "ssh_config").write_text(
        "".join(f"Host node{n}\n  HostName {NET}.{n}\n" for n in (1, 2, 9))
        + f"Host *\n  User root\n  IdentityFile {lab}/key\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    made: list[Node] = []
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(Path("/tmp/egmf-nodes.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # one pair on a machine at a time: names and addresses are fixed
        _clear()
        stack.callback(_clear)
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{NET}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for number in (1, 2):
            made.append(Node(number, lab))
            stack.callback(made[-1].stop)
        for node in made:
            ready = [str(wrapper), "-o", "ConnectTimeout=2", node.name, "true"]
            _eventually(lambda ready=ready: subprocess.run(ready, capture_output=True).returncode == 0)  # type: ignore[misc]
        yield made[0], made[1]


def environment(lab: Path, **more: str) -> dict[str, str]:
    """Of a user on a node: ssh finds the nodes, our environment's programs are on PATH."""
    path = f"{lab}/bin:{Path(sys.executable).parent}:{SBIN}"
    home = {name: os.environ[name] for name in ("HOME", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    return {**home, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", **more}


def inner(started: subprocess.Popen[str]) -> int:
    """The process id (of this machine) of what :meth:`Node.start` started."""
    return int(_eventually(lambda: _children(started.pid))[0])


def missing() -> str | None:
    """Why no nodes can be made here; what can be installed is installed (Debian packages)."""
    if os.getuid() != 0:
        return "network namespaces need root"
    absent = [package for program, package in PACKAGES.items() if not shutil.which(program, path=SBIN)]
    failed = install_packages(absent) if absent else None
    if failed:
        return failed
    tried = subprocess.run(["ip", "netns", "add", "egmfhtry"], env={"PATH": SBIN}, capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made: {tried.stderr.strip()}"
    _run("ip", "netns", "del", "egmfhtry")
    return None


def _clear() -> None:
    """Remove the network of an earlier, interrupted use."""
    links = [["link", "del", name] for name in (BRIDGE, "egmfhv1", "egmfhv2")]
    for command in (*links, ["netns", "del", "egmfh1"], ["netns", "del", "egmfh2"]):
        subprocess.run(["ip", *command], env={"PATH": SBIN}, capture_output=True)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _run(*command: str) -> None:
    done = subprocess.run(command, env={"PATH": SBIN}, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _eventually(what: Any, seconds: float = 30) -> Any:
    until = time.monotonic() + seconds
    while not (value := what()):
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.1)
    return value
