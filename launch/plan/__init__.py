"""What a run needs, before any GPU: memory at every ZeRO stage, bytes on the wire, checkpoints, hours.

A config and a number of GPUs enter; a :class:`~launch.plan.plan.MemoryPlan` leaves. DeepSpeed's
``estimate_zero*_model_states_mem_needs`` know neither activations, 4-bit weights nor buckets, so they are not used.
"""
