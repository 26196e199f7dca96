"""Saving a run so that it can be continued bit by bit: written whole or not at all, verified, on any number of ranks.

In: a DeepSpeed engine and where the run stands (:class:`trainer.checkpoint.state.CheckpointState`). Out: `checkpoints/step-*` and the
same engine again, or a refusal that says what differs; also the choice of the best checkpoint.
"""
