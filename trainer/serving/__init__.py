"""A trained model outside of its run folder: exported, and answering in Python, in MLflow and over HTTP.

In: an exported folder, a run folder or a version of a registered model (`locate.py`). Out: answers (`predictor.py`).
"""
