"""The record of a run: a journal on disk first, from there to MLflow by a thread, and progress on the terminal.

In: numbers, files and the state of a run. Out: `journal.jsonl`, an MLflow run that equals it, log lines. Training never waits for a
server, and nothing a server does ends a run.
"""
