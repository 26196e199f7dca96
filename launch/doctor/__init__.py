"""Whether a machine, its libraries, a config's data and model, and all ranks together can run.

A config, if any, and a number of processes enter; one :class:`~launch.doctor.findings.Check` per finding leaves.
"""
