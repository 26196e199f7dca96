"""Environment variables and exit codes shared by launchers and workers; a worker stops soon after its launcher has ended.

DeepSpeed's and torchrun's workers do not notice that the process which started them was killed, or that the ssh connection
behind it broke: they would go on training unnoticed, or wait for each other for ever.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import signal
import stat
import threading
import time

log = logging.getLogger(__name__)

STOPPED = 85  # exit code of a run that stopped on request and can be continued
RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # every launcher sets them
RANK_VARIABLES = (*RENDEZVOUS_VARIABLES, "LOCAL_WORLD_SIZE")  # all that give a process its place among a run's ranks
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # ranks on this machine, as torchrun and as DeepSpeed name them

EGMF_LAUNCHER = "EGMF_LAUNCHER"  # set by our launchers, "local" or "agent" (over ssh); they send the signal themselves
EGMF_SECRET = "EGMF_SECRET"  # shared by the ranks of a run, which sign their handshake with it; set by our launchers
LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID", EGMF_LAUNCHER)  # set by deepspeed, torchrun, and us
LIMIT = 300.0  # seconds that a worker has to save and leave


def run_secret() -> str:
    """The secret of a run that is started here: the environment's, or 32 random bytes in hexadecimal."""
    return os.environ.get(EGMF_SECRET) or secrets.token_hex(32)


def follow_launcher() -> None:
    """Watch, in a thread, for the launcher's end: then a stop signal to this process, and after `LIMIT` its end.

    In a run of several nodes also for the loss of the connection that carries our output. Does nothing in a process that
    no launcher started.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return
    parent = os.getppid()
    remote = int(os.environ.get("CROSS_SIZE", "1")) > 1 or os.environ.get(EGMF_LAUNCHER) == "agent"
    streams = [fd for fd in (1, 2) if remote and _is_connection(fd)]
    threading.Thread(target=_watch, args=(parent, streams), name="follow-launcher", daemon=True).start()


def _watch(parent: int, streams: list[int]) -> None:
    poll = select.poll()
    for stream in streams:
        poll.register(stream, 0)  # errors and hang-ups are always reported
    while os.getppid() == parent:
        if poll.poll(500):
            _silence(streams)
            why = "the connection to the launcher is lost"
            break
    else:
        why = f"the launcher (process {parent}) has ended"
    log.warning("%s: stopping", why)
    if EGMF_LAUNCHER not in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LIMIT)
    os._exit(1)


def _is_connection(stream: int) -> bool:
    mode = os.fstat(stream).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _silence(streams: list[int]) -> None:
    """Redirect these streams to /dev/null; writing to a lost connection would end the process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)
