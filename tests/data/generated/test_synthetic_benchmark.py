"""Stand-ins: shapes and shares as said, evidence where it is said to be and nowhere else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.data.generated.test_diagnostic import decode
from trainer.data.dataset import open_dataset
from trainer.data.generated import diagnostic, synthetic_benchmark
from trainer.data.readers.raw import RawSample

N = 1600


@pytest.fixture(scope="module", params=["meld", "cherma", "mosei", "simsv2"])
def made(request: pytest.FixtureRequest) -> tuple[str, list[RawSample]]:
    return request.param, list(synthetic_benchmark._samples(request.param, 0, {"train": N}, "train"))


def classes(name: str, samples: list[RawSample]) -> np.ndarray:
    return np.array([synthetic_benchmark.SHAPES[name].answers.index(s.label) for s in samples])


def test_kinds_are_even_and_classes_have_their_shares_in_every_kind(made: tuple[str, list[RawSample]]) -> None:
    name, samples = made
    shape = synthetic_benchmark.SHAPES[name]
    assert Counter(s.kind for s in samples) == dict.fromkeys(synthetic_benchmark.KINDS, N // 4)
    for kind in synthetic_benchmark.KINDS:
        counts = np.bincount(classes(name, [s for s in samples if s.kind == kind]), minlength=4)
        np.testing.assert_allclose(counts / counts.sum(), shape.shares, atol=0.006)
    assert {s.language for s in samples} == {synthetic_benchmark.BUILT_IN[name].language}
    assert {(s.audio.shape[1], s.video.shape[1]) for s in samples} == {(shape.audio, shape.video)}


def test_the_evidence_can_be_read_back(made: tuple[str, list[RawSample]]) -> None:
    """The inverse of the task's matrix, estimated from nothing but the file's own constants, gives the planted frames."""
    name, samples = made
    number = synthetic_benchmark.zlib.crc32(name.encode())
    shape = synthetic_benchmark.SHAPES[name]
    back = {
        m: synthetic_benchmark._orthonormal(
            np.random.default_rng([synthetic_benchmark.VERSION, 0, number]), getattr(shape, m)
        ).T
        for m in ("audio", "video")
    }
    truth = classes(name, samples)
    for kind in diagnostic.KINDS:
        of = [i for i, s in enumerate(samples) if s.kind == kind]
        found = [decode(kind, samples[i].audio @ back["audio"], samples[i].video @ back["video"]) for i in of]
        assert (np.array(found) == truth[of]).mean() > 0.97


def test_the_text_tells_in_its_own_kind_and_in_no_other(made: tuple[str, list[RawSample]]) -> None:
    name, samples = made
    words = {w: k for k, w in enumerate(synthetic_benchmark.TELLING[synthetic_benchmark.BUILT_IN[name].language])}
    truth = classes(name, samples)
    for s, k in zip(samples, truth, strict=True):
        output = [words[w] for w in words if w in s.text]
        assert output == ([k] if s.kind == "text" else [])
    other = [i for i, s in enumerate(samples) if s.kind != "text"]
    vocabulary = sorted({c for s in samples for c in s.text.split() + list(s.text)})
    bag = np.array([[w in samples[i].text for w in vocabulary] for i in other], float)
    fitted = LogisticRegression(max_iter=500).fit(bag[::2], truth[other][::2])
    chance = max(synthetic_benchmark.SHAPES[name].shares)
    assert fitted.score(bag[1::2], truth[other][1::2]) < chance + 4 * np.sqrt(0.25 / (len(other) / 2))


def test_it_is_a_function_of_task_seed_and_size(tmp_path: Path) -> None:
    sizes = {"train": 32, "valid": 16, "test": 16}
    prints = [
        synthetic_benchmark.generate("mosei", tmp_path / f"{i}", seed=s, sizes=sizes).fingerprint
        for i, s in enumerate((1, 1, 2))
    ]
    assert prints[0] == prints[1] != prints[2]
    assert "not the benchmark" in str(open_dataset(tmp_path / "0").record)
    with pytest.raises(ValueError, match="no synthetic benchmark for task 'diagnostic'"):
        synthetic_benchmark.generate("diagnostic", tmp_path / "x")
    with pytest.raises(ValueError, match="too few samples"):
        synthetic_benchmark.generate("meld", tmp_path / "x", sizes={"test": 5})
