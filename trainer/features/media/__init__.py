"""Media files to sound and pictures on one axis of time, by PyAV.

In: :class:`trainer.features.types.Clip`. Out: Sound, and a stream of Picture, with notes on what is missing. `clip.py` is the door.
"""
