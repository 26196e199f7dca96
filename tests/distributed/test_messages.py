"""How ranks and faults are listed, and which errors of the network mean that another rank is gone."""

from __future__ import annotations

import pytest

from trainer.distributed.messages import format_faults, format_ranks, group_by_value, join_truncated
from trainer.distributed.world import ConnectionLost, PeerFault, lost_connections_typed


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1, 2, 5], "ranks 0-2, 5"),
        ([7, 6], "ranks 6-7"),
        ([1, 3], "ranks 1, 3"),
        (range(1000), "ranks 0-999"),
    ],
)
def test_ranks_are_listed_as_spans(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text


def test_long_lists_are_cut_and_counted() -> None:
    assert join_truncated(list("abcd")) == "a, b, c, d"
    assert join_truncated(list("abcdef")) == "a, b, c, d and 2 more"
    assert format_faults(["x"], "head") == "head: 1 fault\n  x"
    assert group_by_value([("a", "1"), ("b", "2"), ("c", "1")]) == {"1": ["a", "c"], "2": ["b"]}


@pytest.mark.parametrize("text", ["Connection closed by peer [127.0.0.1]:1234", "writev: Connection reset by peer"])
def test_a_broken_connection_has_a_type(text: str) -> None:
    with pytest.raises(ConnectionLost, match=r"another rank has ended.*by peer\)") as lost, lost_connections_typed():
        raise RuntimeError(f"[pair.cc:553] {text}")
    assert isinstance(lost.value, PeerFault)
    assert text in str(lost.value.__cause__)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), PeerFault("rank 1: Connection closed by peer"), OSError("x")]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, lost_connections_typed():
        raise error
    assert raised.value is error
