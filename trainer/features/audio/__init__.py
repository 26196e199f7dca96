"""Sound to features of its frames: log-mel bands with pitch and energy, audio encoders, openSMILE; speech activity and transcription.

In: :class:`trainer.features.types.Sound`. Out: ModalityFeatures, or text with its words. `features.py` is the door.
"""
