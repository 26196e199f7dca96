"""Pictures to features of their frames: faces, their landmarks and tracks, aligned crops, vision encoders.

In: the pictures of a clip, in order. Out: ModalityFeatures. `features.py` is the door.
"""
