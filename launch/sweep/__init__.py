"""Many runs from one command: sweeps over seeds and values, suites, and the tables that reproduce a paper's.

A config with values and seeds, or a suite, enters. Run folders, ``sweep.json`` and tables leave; the same command continues.
"""
