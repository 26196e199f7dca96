"""The commands of `egmf`: options to one call of the package, results to text or JSON.

Imports of torch, rich and the package's heavy parts stay inside the functions, so that ``egmf --help`` is quick.
"""
