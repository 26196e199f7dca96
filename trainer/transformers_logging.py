"""What transformers says, kept quiet where it would only repeat what is checked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_transformers(least: int = logging.ERROR) -> Iterator[None]:
    """Without the progress bars, reports and warnings of transformers, those below the level `least`: many processes run at once, and what
    matters in a report is checked."""
    from transformers.utils import logging as library

    transformers_logging: Any = library
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(least)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
