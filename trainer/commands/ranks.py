"""How a command becomes a rank of a run, and ends with the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.commands.output import say
from trainer.distributed.light_imports import collected_later

if TYPE_CHECKING:
    from trainer.distributed.world import World


def run_as_rank(work: Callable[[World], int], debug: bool, seconds: float | None = None, *, trains: bool = True) -> int:
    """`work` as this process's rank of the run; its exit code. A fault names its rank and ends the process at once.

    `seconds` is how long the ranks wait for each other at start-up. Work that does not train (`trains` false) does without DeepSpeed and
    process group where it is one process. The ranks end together: a launcher that ends the others
    when one leaves with a code other than 0 would otherwise interrupt what rank 0 writes last.
    """
    with collected_later():
        from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    from trainer.distributed.faults import report_to_launcher
    from trainer.distributed.process_group import start_world, stop_world
    from trainer.distributed.rendezvous import SECONDS
    from trainer.distributed.world import PeerFault, lost_connections_typed
    from trainer.logs import set_up_logging

    set_up_logging(None, int(os.environ.get("RANK", "0")), debug=debug)
    try:
        world = start_world(seconds or SECONDS, trains=trains)
    except ValueError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        say(f"error on rank {os.environ.get('RANK', '?')}: {error}")
        report_to_launcher(error)
        return 1
    try:
        with lost_connections_typed():
            code = work(world)
            world.barrier()
    except Exception as error:
        if world.size == 1:
            raise
        # leaving the process group would wait for the others; they end when they miss this rank
        if debug or not (isinstance(error, (ValueError, PeerFault))):
            import traceback

            traceback.print_exc()
        say(f"error on rank {world.rank}: {error}")
        sys.stderr.flush()
        report_to_launcher(error)
        os._exit(1)
    stop_world()
    return code
