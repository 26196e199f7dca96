"""The fusion network: encoders, registered experts, the hierarchical gate and expert heads.

In: text embeddings and padded audio and video features of one task, with masks. Out: K pseudo tokens, gate weights, the experts' own answers.
A new expert is a subclass of :class:`trainer.models.fusion.expert.Expert` (docs/extending.md).
"""
