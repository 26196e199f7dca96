"""A trained run as an MLflow model: logged, registered, loaded again, and promoted where it is better.

In: a run folder and its artefact, or a comparison. Out: a version in MLflow's registry, its folder, an alias.
"""
