"""Comparing runs: which runs belong together, scores over seeds, paired differences with intervals and corrected p-values.

In: run folders or MLflow runs, with their predictions. Out: a :class:`comparison.Comparison`, written as tables, JSON, CSV,
LaTeX and one page, and logged to MLflow; the tables of suites (`evidence`).
"""
