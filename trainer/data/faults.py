"""Faults of published data: one line each while they are found, one report at the end."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message lists every fault: how many, where, and what to do."""
