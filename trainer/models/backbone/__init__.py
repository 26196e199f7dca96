"""The backbone, a causal language model of any family: loading, 4-bit weights, ZeRO-3 partitioning, adapters, attention, packed rows, the tiny LM.

In: a hub name or folder, and the config's `backbone` and `adapter`. Out: embeddings -> hidden states -> logits as three separate steps.
At load time a few tokens check that logits and packed attention equal the model's own.
"""
