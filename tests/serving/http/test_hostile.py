"""Hostile requests: each refused with a status from 400 to 499 and a reason, while good ones are answered and memory stays."""

from __future__ import annotations

import os

import psutil

from benchmarks.hostile_requests import MAKERS, Target, attack
from tests.serving.http.servers import InThread


def test_three_hundred_hostile_requests(server: InThread) -> None:
    process = psutil.Process(os.getpid())
    attack(Target(server.port), len(MAKERS), seed=1)
    before = process.memory_info().rss
    judged = attack(Target(server.port), 300)
    assert judged.wrong == []
    assert judged.good == 15
    assert (
        len(judged.sent) == len({maker.__name__ for maker in MAKERS}) + 1
    )  # bodies that are too large come in two ways
    assert judged.codes.keys() >= {
        "bad_json",
        "bad_samples",
        "bad_http",
        "bad_form",
        "too_large",
        "slow_body",
        "slow_headers",
    }
    assert process.memory_info().rss - before < 200 << 20
    assert server.server.service.held.held == server.server.service.places.held == 0
    assert server.predict([{"text": "still there", "task": "meld"}]).status == 200
