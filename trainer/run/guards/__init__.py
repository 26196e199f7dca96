"""What protects a run from bad steps: batches that do not fit are found before the first step, non-finite steps are skipped.

In: an engine and its batches. Out: a decision for all ranks, or an error that names samples and the settings to change; a dump of the
step, which `egmf replay` repeats.
"""
