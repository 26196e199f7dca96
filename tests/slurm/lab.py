"""A real Slurm on this machine: every node is a network namespace with its own address, host name and daemons.

Nothing of the system's own configuration is touched. All daemons are our children, and all that runs on a node is found by its
namespace, so that a node can be lost, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.start.local import die_with_parent
from tests.distributed.processes import free_port, install_packages

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")
PACKAGES = ("slurm-wlm", "munge", "iproute2")
NET, BRIDGE, NODE_PORT = "10.79.0", "slbr0", 17818
GPUS, CPUS_PER_GPU = 4, 6  # of the node that has GPUs
NODE_TIMEOUT = 10  # SlurmdTimeout: seconds until Slurm marks a silent node down

CONF = """
ClusterName=egmf
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout={timeout}
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=debug Nodes={plain} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={with_gpus} MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no Slurm can be started here; what can be installed is installed."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not all(map(shutil.which, PROGRAMS)):
        if shutil.which("apt-get") is None:
            return f"no {', '.join(p for p in PROGRAMS if not shutil.which(p))} and no apt-get to install it with"
        failed = install_packages(PACKAGES)
        if failed:
            return failed
    tried = subprocess.run(["ip", "netns", "add", "slntry"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "slntry"], check=True)
    return None


class Lab:
    """The cluster: plain nodes, and one with GPUs in the partition `gpu`; use as a context. Its `environment` makes Slurm's commands find it."""

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 4) -> None:
        self.folder = folder
        self.cpus = {f"node{i + 1}": cpus for i in range(nodes)} | {f"node{nodes + 1}": GPUS * CPUS_PER_GPU}
        self.nodes = list(self.cpus)
        self.gpu_node = self.nodes[-1]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone())
            self._clear()  # an interrupted use leaves its network behind
            stack.callback(self._close)
            self._write()
            self._network()
            self._munge()
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self.idle() == set(self.nodes), 60, lambda: self.run("sinfo", "-N", "-l"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60
        )
        return (done.stdout + done.stderr).strip()

    def idle(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())

    def job(self, number: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        output = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in output.split() if "=" in word)

    def start_node(self, node: str) -> None:
        """The node's daemon, in its namespaces: own address, host name, /etc/hosts and shared memory."""
        hosts = self.folder / node / "hosts"
        script = f"hostname {node} && mount --bind {hosts} /etc/hosts && mount -t tmpfs none /dev/shm && exec slurmd -D -N {node}"
        inside = ["nsenter", f"--net=/run/netns/{_namespace(node)}", "unshare", "--uts", "--mount", "sh", "-c", script]
        self._start(node, inside)

    def lose(self, node: str, *, silently: bool) -> None:
        """Kill everything on the node; `silently`: after cutting its network, so that no connection is closed."""
        if silently:
            subprocess.run(["ip", "link", "set", f"slv{node[4:]}", "down"], check=True)
        for pid in _inside(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def bring_back(self, node: str) -> None:
        subprocess.run(["ip", "link", "set", f"slv{node[4:]}", "up"], check=True)
        self.start_node(node)
        wait_for(lambda: node in self.idle(), 60, lambda: self.run("sinfo", "-N", "-l"))

    def _start(self, name: str, command: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        env, parent = {**os.environ, **self.environment}, os.getpid()
        self._daemons[name] = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: die_with_parent(parent),
        )

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        host = socket.gethostname().partition(".")[0]
        partitions = {"plain": ",".join(self.nodes[:-1]), "with_gpus": self.gpu_node}
        values = {"host": host, "net": NET, "port": free_port(), "folder": self.folder, "timeout": NODE_TIMEOUT}
        *lines, debug, gpu = CONF.format(**values, **partitions).strip().splitlines()
        for i, node in enumerate(self.nodes, 1):
            (self.folder / node).mkdir()
            (self.folder / node / "hosts").write_text(f"127.0.0.1 localhost\n{NET}.{i} {node}\n{NET}.254 {host}\n")
            gpus = f" Gres=gpu:{GPUS}" if node == self.gpu_node else ""
            own = f"NodeName={node} NodeAddr={NET}.{i} Port={NODE_PORT} CPUs={self.cpus[node]} RealMemory=4000{gpus}"
            lines.append(own)
        (self.folder / "slurm.conf").write_text("\n".join([*lines, debug, gpu]) + "\n")
        for i in range(GPUS):  # Slurm asks no more of a GPU than a device's file: a null device here
            os.mknod(self.folder / f"gpu{i}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"NodeName={self.gpu_node} Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        )
        # slurmd loads a cgroup plugin although nothing uses it; only v1's loads without systemd
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _network(self) -> None:
        commands = [f"link add {BRIDGE} type bridge", f"addr add {NET}.254/24 dev {BRIDGE}", f"link set {BRIDGE} up"]
        for i, node in enumerate(self.nodes, 1):
            name, veth = _namespace(node), f"slv{node[4:]}"
            commands += [
                f"netns add {name}",
                f"link add {veth} type veth peer name eth0 netns {name}",
                f"link set {veth} master {BRIDGE} up",
                f"-n {name} addr add {NET}.{i}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
            ]
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"ip {command}: {done.stderr.strip()}")

    def _munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={folder}/{name}" for option, name in names.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])  # as root: the folder may be private
        wait_for((folder / "socket").exists, 30, lambda: (self.folder / "munged.out").read_text())

    def _close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--full", "--user=root")
        self._end_nodes()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._clear()

    def _end_nodes(self) -> None:
        for node in self.nodes:
            for pid in _inside(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _clear(self) -> None:
        """Remove the network, with all that runs on the nodes; an interrupted lab's too: no one else uses these names."""
        self._end_nodes()
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", _namespace(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def wait_for(what: Callable[[], object], seconds: float, otherwise: Callable[[], object] = lambda: "") -> None:
    """Wait until `what` is true; fails with the text that `otherwise` returns."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {otherwise()}")
        time.sleep(0.2)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One lab on a machine at a time: names and addresses are fixed."""
    with Path("/tmp/egmf-slurm-lab.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _namespace(node: str) -> str:
    return f"sln{node[4:]}"


def _inside(node: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", _namespace(node)], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]
