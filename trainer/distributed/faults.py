"""Why a rank failed: by its own fault, or only because another rank had ended; and how its launcher learns of it.

The cause goes into torchelastic's error file (``TORCHELASTIC_ERROR_FILE``), which torchrun and our launchers read, with
one field of our own: whether the rank only missed a peer. Among several failures the others explain the run's end.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

MISSED_PEER = "egmf_missed_peer"


class Fault(NamedTuple):
    """What a rank left as its reason."""

    message: str
    missed_peer: bool  # the rank only noticed that another one had ended


def report_to_launcher(error: BaseException) -> None:
    """Leave the cause where our launchers, and torchrun, look for it; the first one stays."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place or os.path.exists(place):
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from trainer.distributed.world import as_peer_fault  # imports torch, which launchers do without

    with contextlib.suppress(OSError):
        get_error_handler().record_exception(error)
        path = Path(place)
        record = json.loads(path.read_text(encoding="utf-8"))
        record[MISSED_PEER] = as_peer_fault(error) is not None
        path.write_text(json.dumps(record), encoding="utf-8")


def read_fault(path: Path) -> Fault | None:
    """What :func:`report_to_launcher` left in a file; None where there is nothing that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Fault(str(record["message"]["message"]), record.get(MISSED_PEER, False) is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
