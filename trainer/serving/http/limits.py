"""What one request may ask, and what the whole server holds at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Every limit of the server. Whatever exceeds one is refused with a status from 400 to 499 and a reason.

    Args:
        max_queue: samples that are taken and not yet answered; a request beyond them gets 429.
        max_wait_ms: milliseconds that a sample waits for others to share its batch.
        max_body_mib: MiB of a JSON request.
        max_clip_mib: MiB of a multipart request, which brings a clip or feature files.
        max_held_mib: MiB of bodies and arrays of all requests that are not yet answered.
        max_samples: samples of one request.
        max_frames: frames of one array.
        max_text: characters of one text.
        body_seconds: for a request's headers, and for its body.
        clip_seconds: for the features of one clip.
        answer_seconds: from a request's body to its answer.
        stop_seconds: for what was taken, once the server is told to stop.
        max_connections: connections that are open.
    """

    max_queue: int = 256
    max_wait_ms: float = 5.0
    max_body_mib: float = 32.0
    max_clip_mib: float = 64.0
    max_held_mib: float = 512.0
    max_samples: int = 64
    max_frames: int = 4000
    max_text: int = 4000
    body_seconds: float = 30.0
    clip_seconds: float = 60.0
    answer_seconds: float = 60.0
    stop_seconds: float = 60.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError with every limit that lets nothing through."""
        faults = []
        for one in fields(self):
            value = getattr(self, one.name)
            least = 0 if one.name == "max_wait_ms" else 1 if isinstance(one.default, int) else 1e-3
            if not (math.isfinite(value) and value >= least):
                faults.append(f"--{one.name.replace('_', '-')} is at least {least:g}, not {value:g}")
        if max(self.max_body_mib, self.max_clip_mib) > self.max_held_mib:
            faults.append(
                f"--max-held-mib ({self.max_held_mib:g}) is less than one request may have "
                f"({max(self.max_body_mib, self.max_clip_mib):g}): no such request would ever be taken"
            )
        if self.max_samples > self.max_queue:
            faults.append(
                f"--max-queue ({self.max_queue}) is less than --max-samples ({self.max_samples}): a request of so many would never be taken"
            )
        if faults:
            raise ValueError("\n".join(faults))

    @property
    def body_bytes(self) -> int:
        """The longest JSON body."""
        return int(self.max_body_mib * MIB)

    @property
    def clip_bytes(self) -> int:
        """The longest multipart body."""
        return int(self.max_clip_mib * MIB)

    @property
    def held_bytes(self) -> int:
        """The most bytes of bodies and arrays at once."""
        return int(self.max_held_mib * MIB)
