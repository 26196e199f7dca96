"""A run on several machines over ssh: each node gets an agent that starts its ranks.

Why the project has an agent (:mod:`launch.start.agent`) and not DeepSpeed's runner over pdsh: that one answers a stop signal with a
`pkill -f` on every host, which also ends other people's runs of the same interpreter; it exits 0 when its own helper is
killed; it writes environment variables, tokens included, into a command line that all users of a node can read; and it
cannot say which rank failed first, and why. `deepspeed --hostfile` itself gives the same run for those who prefer it.

The connection is the control channel: an agent whose launcher is gone, or silent for `launch.start.agent.SILENCE`
seconds, stops its workers, so nothing outlives the run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from launch.start.agent import HEARTBEAT, MARK, StartRequest, Verdict
from launch.start.hostfile import LaunchPlan
from launch.start.local import FAILURE_GRACE, RunState, check_done, forward_signals, run_state
from launch.start.ssh import SSH_FAILED, ssh_command
from trainer.distributed.launcher import EGMF_SECRET, STOPPED, run_secret

AGENT_GRACE = 60.0  # seconds that agents have to end their workers when asked to


class Agents:
    """The agents of all nodes, over one ssh connection each."""

    def __init__(self, plan: LaunchPlan, env: dict[str, str]) -> None:
        self.plan = plan
        self.verdicts: dict[int, Verdict] = {}
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._connections = [self._connect(number, env) for number in range(len(plan.hosts))]
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def _connect(self, number: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
        command = ssh_command(self.plan.hosts[number].name, [sys.executable, "-m", "launch.start.agent"])
        connection = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        request = StartRequest(self.plan.ranks()[number], env, str(self.plan.out))
        self._send(connection, request.to_json())
        threading.Thread(target=self._listen, args=(number, connection), daemon=True).start()
        return connection

    def _listen(self, number: int, connection: subprocess.Popen[bytes]) -> None:
        assert connection.stderr is not None
        for raw in connection.stderr:
            line = raw.decode(errors="replace")
            verdict = Verdict.from_line(line)
            if verdict is not None:
                self.verdicts[number] = verdict
                line = line.partition(MARK)[0]
            sys.stderr.write(line)
        self._ended.put((number, connection.wait()))

    def _send_heartbeats(self) -> None:
        """An agent that gets none for long stops."""
        while not self._over.wait(HEARTBEAT):
            for connection in self._connections:
                self._send(connection, "")

    def _send(self, connection: subprocess.Popen[bytes], word: str) -> None:
        assert connection.stdin is not None
        left = f"{word}\n".encode()
        with contextlib.suppress(OSError):  # it has ended, as its exit code says
            while left:  # unbuffered: signal handlers and threads write here
                left = left[os.write(connection.stdin.fileno(), left) :]

    def signal(self, number: int) -> None:
        """Pass a signal to every worker of every node."""
        for connection in self._connections:
            self._send(connection, signal.Signals(number).name)

    def wait(self) -> None:
        """Until all have ended; when a node fails, the others get time to notice, and are then ended."""
        left = len(self._connections)
        until: float | None = None
        ending = False
        while left:
            try:
                number, code = self._ended.get(timeout=0.5)
            except queue.Empty:
                if until is not None and time.monotonic() > until:
                    if ending:
                        self._disconnect()
                    else:
                        self._end_workers()
                        ending, until = True, time.monotonic() + AGENT_GRACE
                continue
            left -= 1
            verdict = self.verdicts.setdefault(number, Verdict(code))
            if verdict.code not in (0, STOPPED) and until is None:
                until = time.monotonic() + FAILURE_GRACE + 5
        self._over.set()

    def _end_workers(self) -> None:
        for connection in self._connections:
            self._send(connection, "END")

    def _disconnect(self) -> None:
        for connection in self._connections:
            if connection.poll() is None:
                connection.kill()

    def close(self) -> None:
        """Close every open connection: the agents end their workers."""
        self._over.set()
        self._disconnect()


def launch(plan: LaunchPlan, env: dict[str, str]) -> int:
    """Run the plan to its end; see :func:`launch.start.local.launch` for what it returns.

    SIGINT, SIGTERM and SIGHUP (as SIGTERM) reach every worker: the run stops at one step, saves, and 85 is returned.
    """
    before = run_state(plan.out)
    agents = Agents(plan, {**env, EGMF_SECRET: run_secret()})
    with contextlib.closing(agents), forward_signals(agents.signal):
        agents.wait()
    return conclude(plan, agents.verdicts, before)


def conclude(plan: LaunchPlan, verdicts: Mapping[int, Verdict], before: RunState) -> int:
    """The exit code, from how each node ended and the run's record (`before`: the record at the start)."""
    failed = {number: verdict for number, verdict in verdicts.items() if verdict.code not in (0, STOPPED)}
    state = run_state(plan.out)
    if failed:  # in order of their ends
        number = next((n for n, verdict in failed.items() if not verdict.missed_peer), next(iter(failed)))
        verdict, name = failed[number], plan.hosts[number].name
        if state != before and state.state == "stopped":
            sys.stderr.write(
                f"{_describe_loss(name, verdict)}; the other processes saved and stopped: the same command continues\n"
            )
            return STOPPED
        sys.stderr.write(f"node {name}: {verdict.failure or f'the run failed: {_describe_loss(name, verdict)}'}\n")
        return verdict.code if 0 < verdict.code < SSH_FAILED else 1
    if any(verdict.code == STOPPED for verdict in verdicts.values()):
        return STOPPED
    return check_done(plan.out)


def _describe_loss(name: str, verdict: Verdict) -> str:
    lost = verdict.code == SSH_FAILED
    how = "the connection was lost" if lost else f"its agent ended with code {verdict.code}"
    return f"{name}: {how} before it reported how its processes ended"
