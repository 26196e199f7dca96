"""The run, read top to bottom in :mod:`trainer.run.loop`: assemble, train step by step, validate, save, evaluate the best.

In: a checked config, prepared datasets, the ranks. Out: a run folder with record, journal, checkpoints, predictions and metrics.
Extend it by a :class:`trainer.run.callbacks.Callback`.
"""
