"""The chosen face of each picture: the largest, or the one that is seen longest."""

from __future__ import annotations

import itertools

import numpy as np

from trainer.features.video import tracks
from trainer.features.video.tracks import Tracks


def box(x: float, y: float, side: float) -> np.ndarray:
    return np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2])


def follow(clip: list[list[tuple[str, np.ndarray]]], choose: str = "track", rate: float = 10.0) -> dict[int, str]:
    """The names of the chosen face, by picture; the faces of a picture come the largest first."""
    made: Tracks[str] = Tracks(choose)  # type: ignore[arg-type]
    for k, faces in enumerate(clip):
        ordered = sorted(faces, key=lambda face: -float(np.prod(face[1][2:] - face[1][:2])))
        made.add((k + 0.5) / rate, [one for _, one in ordered], [name for name, _ in ordered])
    return made.chosen()


def test_longer_seen_face_is_kept_although_another_is_larger() -> None:
    clip = [[("a", box(100 + 3 * k, 100, 40)), *([("b", box(300, 100, 90))] if 4 <= k < 10 else [])] for k in range(14)]
    assert follow(clip) == dict.fromkeys(range(14), "a")
    assert follow(clip, "largest") == {k: "b" if 4 <= k < 10 else "a" for k in range(14)}


def test_faces_that_pass_each_other_keep_their_tracks() -> None:
    clip = [[("a", box(100 + 20 * k, 100, 60)), ("b", box(300 - 20 * k, 160, 58))] for k in range(11)]
    assert set(follow([*clip, [("a", box(320, 100, 60))]]).values()) == {"a"}
    assert set(follow([*clip, [("b", box(80, 160, 58))]]).values()) == {"b"}


def test_short_gap_is_bridged_and_a_long_one_ends_a_track() -> None:
    clip: list[list[tuple[str, np.ndarray]]] = (
        [[("a", box(100, 100, 50))]] * 4 + [[]] * 5 + [[("a", box(105, 100, 50))]] * 4
    )
    assert sorted(follow(clip)) == [0, 1, 2, 3, 9, 10, 11, 12]
    long = [*clip[:4], *[[]] * 30, *clip[9:], *clip[9:]]
    assert sorted(follow(long)) == list(range(34, 42))
    assert sorted(follow([*clip[9:], *clip[9:], *[[]] * 30, *clip[:4]])) == list(range(8))


def test_slow_rates_still_make_tracks() -> None:
    """Successive pictures are matched even where more than the longest gap lies between them."""
    clip = [[("a", box(100, 100, 50)), *([("b", box(300, 100, 60))] if k % 2 else [])] for k in range(6)]
    assert follow(clip, rate=0.2) == dict.fromkeys(range(6), "a")


def test_a_face_elsewhere_or_of_another_size_is_another() -> None:
    clip = [[("a", box(100, 100, 50))]] * 3 + [[("b", box(100, 100, 160))]] * 4 + [[("c", box(400, 100, 150))]] * 5
    assert follow(clip) == dict.fromkeys(range(7, 12), "c")


def test_of_tracks_of_one_length_the_larger_then_the_earlier() -> None:
    a, b = ("a", box(100, 100, 50)), ("b", box(300, 100, 55))
    assert follow([[a, b]] * 5) == dict.fromkeys(range(5), "b")
    same = ("c", box(300, 100, 50))
    assert follow([[a]] * 3 + [[same]] * 3) == dict.fromkeys(range(3), "a")


def test_no_faces() -> None:
    assert follow([[], [], []]) == {}
    assert follow([]) == {}
    assert follow([[]], "largest") == {}


def test_matching_equals_all_ways_tried() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        old = [box(*random.uniform(0, 120, 2), random.uniform(30, 70)) for _ in range(random.integers(1, 5))]
        new = [box(*random.uniform(0, 120, 2), random.uniform(30, 70)) for _ in range(random.integers(1, 5))]

        def cost(a: np.ndarray, b: np.ndarray) -> float | None:
            sides = a[2] - a[0], b[2] - b[0]
            distance = np.hypot(*(a[:2] + a[2:] - b[:2] - b[2:])) / 2 / (sum(sides) / 2)
            if distance >= 1 or max(sides) / min(sides) >= 2:
                return None
            common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            return float(distance - common / (sides[0] ** 2 + sides[1] ** 2 - common))

        def total(pairs: dict[int, int], old: list[np.ndarray] = old, new: list[np.ndarray] = new) -> tuple[int, float]:
            """Refused matches first, then the sum of costs."""
            costs = [cost(old[i], new[j]) for j, i in pairs.items()]
            return -len([c for c in costs if c is not None]), sum(c for c in costs if c is not None)

        best = (0, 0.0)
        for places in itertools.product([*range(len(old)), None], repeat=len(new)):
            pairs = {j: i for j, i in enumerate(places) if i is not None}
            if len(set(pairs.values())) == len(pairs) and all(
                cost(old[i], new[j]) is not None for j, i in pairs.items()
            ):
                best = min(best, total(pairs))
        found = total(tracks._matches(old, new))
        assert found[0] == best[0]
        assert abs(found[1] - best[1]) < 1e-9
