"""A trained model outside its run: the exported artefact, and the doors to it in Python, MLflow and HTTP.

A run folder or an artefact enters; answers to samples leave. Light to import: each door loads what it needs.
"""
