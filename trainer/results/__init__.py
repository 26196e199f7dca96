"""Results of trained runs: predicting new samples, robustness to missing input, tables and pages, comparisons.

In: run folders (and MLflow stores), prepared datasets, JSON lines of new samples. Out: predictions, tables for the terminal,
JSON, ``report.html``, comparisons of many runs. Nothing here trains, and nothing here chooses a checkpoint.
"""
