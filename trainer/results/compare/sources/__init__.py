"""Where compared runs come from: run folders, folders of them, and MLflow stores.

In: what a user names (`find`). Out: finished runs with config, cost and predictions (`compared_run`).
"""
