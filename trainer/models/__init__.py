"""The EGMF model: a fusion network that makes pseudo tokens, before a causal language model that answers in words.

In: batches (:mod:`trainer.batch`), a config, and collectives by a protocol. Out: losses, log-probabilities of answers, gate weights, generated texts.
It knows nothing of datasets, processes, checkpoints or optimizers.
"""
