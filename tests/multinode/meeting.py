"""One rank that joins the process group, prints how and where it listens, and exits."""

from __future__ import annotations

import os
import socket
import sys

import psutil
import torch

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()


def main(seconds: float) -> int:
    try:
        world = start_world(seconds)
    except ValueError as error:
        print(f"REFUSED {error}", flush=True)
        return 1
    one = torch.ones(1)
    world.sum(one)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    print(
        f"MET rank {world.rank} of {world.size} on {socket.gethostname()} by {interface}, sum {one.item():g}",
        flush=True,
    )
    listening = {
        f"{c.laddr.ip}:{c.laddr.port}" for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"
    }
    world.sum(one)  # all are still there
    print(f"LISTENS {' '.join(sorted(listening))}", flush=True)
    stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
