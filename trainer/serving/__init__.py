"""Trained models outside of their run folders: exported artefacts, predictions in Python, in MLflow and over HTTP.

In go run folders, artefacts and samples; out come artefacts and typed predictions. Nothing heavy is imported here.
"""
