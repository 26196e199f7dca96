"""The exported folder of a trained model: what is in it, how it is written, pushed to a hub, and opened again.

A run folder goes in; out comes a folder that answers without run and dataset. Nothing heavy is imported here.
"""
