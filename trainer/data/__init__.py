"""Published files and one's own data to datasets, and datasets to batches.

In: files (`readers`), checked and written once (`preparation`) as memory-mapped Arrow with a fingerprint (`dataset`). Out: global
batches in an order that knows no ranks (`sampling`), cut into micro-batches and collated (`collate`). It knows nothing of models.
"""
