"""Starting runs: on one machine, on many, on Slurm, in sweeps; and what to look at before: plan and doctor.

Configs, hostfiles and options enter. Processes of ``egmf train``, plans, findings and exit codes leave.
"""
