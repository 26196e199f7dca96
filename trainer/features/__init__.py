"""Clips to feature arrays, by one written recipe: decoding, audio, faces, encoders; the recipe and its hash.

In: media files, with the seconds that are meant. Out: arrays `[T, F]` of audio and video, text, and what was missing. Preparation, prediction and
serving extract with the same functions, so features at prediction are those of training. Nothing here knows of tasks or models of EGMF.
"""
