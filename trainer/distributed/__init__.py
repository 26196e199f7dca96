"""Ranks among ranks: rendezvous, process group and its collectives, agreement before the start, stop signals, stuck runs.

In: what a launcher sets (RANK, WORLD_SIZE, MASTER_ADDR, ...). Out: a :class:`trainer.distributed.world.World`, and a fault of one rank
ends all of them, with a message that names the rank.
"""
