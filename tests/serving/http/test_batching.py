"""The queue before the model: what shares a batch, who waits how long, and whom a failure costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from trainer.batch import Sample
from trainer.serving.http.batching import Batcher
from trainer.serving.prediction import Prediction, Prepared


def prepared(name: str, cost: int = 10, tasks: tuple[str, ...] = ("a",)) -> Prepared:
    return Prepared(name, tasks, cost, Sample(name, "", 0.0))


class Model:
    """Answers with the id of each sample, notes the batches, and waits as long as it is held."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, samples: Sequence[Prepared]) -> list[Prediction]:
        self.batches.append([one.id for one in samples])
        self.entered.release()
        assert self.free.wait(10)
        if any(one.id == "bad" for one in samples):
            raise RuntimeError("no answer")
        return [Prediction(one.id, task, one.id, True, one.id) for one in samples for task in one.tasks]

    @contextmanager
    def busy(self, batcher: Batcher) -> Iterator[None]:
        """The model is at work on a first sample, so that all others wait."""
        self.free.clear()
        batcher.submit([prepared("first")])
        self.entered.acquire()
        yield
        self.free.set()


@pytest.fixture
def model() -> Model:
    return Model()


def made(model: Model, tokens: int = 100, most: int = 50, wait: float = 0.0) -> Batcher:
    return Batcher(model, tokens, most, wait)


def ids(ticket: object) -> list[str]:
    return [one.id for one in ticket.done.result(10)]  # type: ignore[attr-defined]


def test_batches_hold_as_many_tokens_as_they_may_in_order(model: Model) -> None:
    batcher = made(model)
    with model.busy(batcher):
        tickets = [
            batcher.submit([prepared(f"{k}{i}", cost) for i in range(2)])
            for k, cost in zip("pqrs", (30, 20, 30, 150), strict=True)
        ]
    assert [ids(ticket) for ticket in tickets] == [["p0", "p1"], ["q0", "q1"], ["r0", "r1"], ["s0", "s1"]]
    assert model.batches == [["first"], ["p0", "p1", "q0", "q1"], ["r0", "r1"], ["s0"], ["s1"]]
    batcher.stop()


def test_batches_hold_no_more_samples_than_they_may(model: Model) -> None:
    batcher = made(model, most=2)
    with model.busy(batcher):
        ticket = batcher.submit([prepared(str(i)) for i in range(5)])
    assert ids(ticket) == list("01234")
    assert [len(batch) for batch in model.batches] == [1, 2, 2, 1]
    batcher.stop()


def test_the_first_waits_for_others_until_the_batch_is_full(model: Model) -> None:
    batcher = made(model, tokens=30, wait=0.5)
    started = time.monotonic()
    tickets = [batcher.submit([prepared(str(i))]) for i in range(3)]
    assert [ids(ticket) for ticket in tickets] == [["0"], ["1"], ["2"]]
    assert time.monotonic() - started < 0.4
    assert model.batches == [["0", "1", "2"]]
    started = time.monotonic()
    assert ids(batcher.submit([prepared("alone")])) == ["alone"]
    assert 0.45 < time.monotonic() - started < 2
    batcher.stop()


def test_what_is_cancelled_is_in_no_batch(model: Model) -> None:
    batcher = made(model)
    with model.busy(batcher):
        gone = batcher.submit([prepared("gone", 100), prepared("gone too", 100)])
        stays = batcher.submit([prepared("stays")])
        gone.cancel()
    assert ids(stays) == ["stays"]
    assert model.batches == [["first"], ["stays"]]
    batcher.stop()


def test_a_failure_costs_none_but_the_request_at_fault(model: Model) -> None:
    batcher = made(model)
    with model.busy(batcher):
        good = batcher.submit([prepared("good"), prepared("also good")])
        bad = batcher.submit([prepared("bad"), prepared("with it")])
        more = batcher.submit([prepared("more")])
    assert ids(good) == ["good", "also good"]
    assert ids(more) == ["more"]
    with pytest.raises(RuntimeError, match="no answer"):
        ids(bad)
    batcher.stop()


def test_several_questions_give_several_answers(model: Model) -> None:
    batcher = made(model)
    ticket = batcher.submit([prepared("x", tasks=("a", "b")), prepared("y")])
    assert [(one.id, one.task) for one in ticket.done.result(10)] == [("x", "a"), ("x", "b"), ("y", "a")]
    batcher.stop()


def test_a_stop_answers_what_waits(model: Model) -> None:
    batcher = made(model, wait=30)
    ticket = batcher.submit([prepared("last")])
    batcher.stop()
    assert ids(ticket) == ["last"]
    with pytest.raises(RuntimeError, match="stopped"):
        batcher.submit([prepared("late")])
