<<<<<<< HEAD
"""Trained models outside of their run folders: exported artefacts, predictions in Python, in MLflow and over HTTP.

In go run folders, artefacts and samples; out come artefacts and typed predictions. Nothing heavy is imported here.
=======
"""A trained model outside of its run folder: exported, and answering in Python, in MLflow and over HTTP.

In: an exported folder, a run folder or a version of a registered model (`locate.py`). Out: answers (`predictor.py`).
>>>>>>> predictor
"""
