"""Four ways to start the same run: local processes, nodes over ssh, one node of several, a Slurm job.

A config, its run folder and the number of ranks enter. Running processes, the first cause of a failure and an exit code
leave: 0 done, 85 stopped and resumable.
"""
