"""All that a server is started with; light to import, and sent to its worker processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer.serving.http.limits import Limits


@dataclass(frozen=True)
class ClipProcesses:
    """How clips are extracted: processes (0: clips are not taken), and the device of the encoders."""

    workers: int = 1
    device: str = "auto"


@dataclass(frozen=True)
class ModelChoice:
    """What is opened, and how; see :meth:`trainer.serving.predictor.Predictor.load`."""

    source: str
    device: str = "auto"
    dtype: str | None = None
    quantization: str | None = None
    tokens: int | None = None
    trust_code: str | None = None


@dataclass(frozen=True)
class ServerSettings:
    """A server: its model, where it listens, who may ask, and its limits.

    Args:
        hosts: names that the Host header may have beside those of the loopback.
        workers: processes that share the port, each with the model.
        unbatched: every sample passes the model alone, to compare with.
    """

    model: ModelChoice
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    clips: ClipProcesses = field(default_factory=ClipProcesses)
    workers: int = 1
    unbatched: bool = False
    debug: bool = False
