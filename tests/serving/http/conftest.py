"""One server that most tests of HTTP share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.http.servers import InThread, serving
from trainer.run.saved import SavedRun
from trainer.serving.http.limits import Limits
from trainer.serving.predictor import Predictor

SMALL = Limits(
    max_queue=64, max_body_mib=1, max_clip_mib=1, max_held_mib=16, max_samples=16, max_frames=200, max_text=300, body_seconds=1.0
)  # fmt: skip


@pytest.fixture(scope="session")
def predictor(opened: SavedRun) -> Predictor:
    return Predictor(opened)


@pytest.fixture(scope="session")
def server(predictor: Predictor) -> Iterator[InThread]:
    with serving(predictor, SMALL) as running:
        yield running
