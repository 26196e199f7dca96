"""The generated data: what pooled features and single modalities cannot know, and what the construction says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainer.data.dataset import open_dataset
from trainer.data.generated import diagnostic
from trainer.data.readers.raw import RawSample
from trainer.tasks import BUILT_IN

LABELS = BUILT_IN["diagnostic"].labels
N = {"train": 6000, "test": 3000}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[RawSample]]:
    source = diagnostic.diagnostic_source("diagnostic", 0, N)
    return {split: list(source.samples(split)) for split in N}


def of_kind(samples: list[RawSample], kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chosen = [s for s in samples if s.kind == kind]
    truth = np.array([LABELS.index(str(s.label)) for s in chosen])
    return np.stack([s.audio for s in chosen]), np.stack([s.video for s in chosen]), truth  # type: ignore[arg-type]


def bound(n: int) -> float:
    """What a guesser of four exceeds once in a hundred thousand times."""
    return float(binom.ppf(1 - 1e-5, n, 0.25) / n)


POOLS = {"mean": lambda x: x.mean(1), "max": lambda x: x.max(1), "min": lambda x: x.min(1)}


def probe(samples: dict[str, list[RawSample]], kind: str, pools: tuple[str, ...], use: str) -> tuple[float, int]:
    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        audio, video, truth = of_kind(samples[split], kind)
        streams = {"audio": [audio], "video": [video], "both": [audio, video]}[use]
        return np.concatenate([POOLS[p](x) for p in pools for x in streams], 1), truth

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    model.fit(*features("train"))
    x, truth = features("test")
    return float(model.score(x, truth)), len(truth)


@pytest.mark.parametrize("kind", diagnostic.KINDS)
@pytest.mark.parametrize("pools", [("mean",), ("max",), ("mean", "max", "min")], ids="-".join)
@pytest.mark.parametrize("use", ["audio", "video", "both"])
def test_pooled_features_are_at_chance(
    samples: dict[str, list[RawSample]], kind: str, pools: tuple[str, ...], use: str
) -> None:
    accuracy, n = probe(samples, kind, pools, use)
    assert accuracy < bound(n), f"{kind}: {accuracy:.3f} on {n}"


@pytest.mark.parametrize("kind", diagnostic.KINDS)
def test_the_text_says_nothing(samples: dict[str, list[RawSample]], kind: str) -> None:
    words = CountVectorizer(analyzer="char", ngram_range=(1, 2))
    chosen = {split: [s for s in rows if s.kind == kind] for split, rows in samples.items()}
    model = make_pipeline(words, LogisticRegression(max_iter=300))
    model.fit([s.text for s in chosen["train"]], [s.label for s in chosen["train"]])
    assert model.score([s.text for s in chosen["test"]], [s.label for s in chosen["test"]]) < bound(len(chosen["test"]))


def decode(kind: str, audio_TF: np.ndarray, video_TF: np.ndarray) -> int:
    """The label by the construction, written apart from the generator's code."""
    if kind == "local":
        fits = [
            [
                sum(audio_TF[s + i, :3] @ diagnostic.CORNERS[corner] for i, corner in enumerate(order))
                for order in diagnostic.ORDERS
            ]
            for s in range(len(audio_TF) - 3)
        ]
        return int(np.array(fits).max(0).argmax())
    if kind == "cross-modal":
        spoken = audio_TF[:, 7:11].max(1) > 1.0  # frames that hold a symbol
        asked = video_TF[:, :4].mean(0)
        match = audio_TF[spoken, 3:7] @ asked
        values = audio_TF[spoken, 7:11].argmax(1)
        return int(np.argmax([match[values == v].mean() for v in range(4)]))
    onset = [int(np.argmax(np.convolve(video_TF[:, 6 + event], np.ones(7), "valid"))) for event in range(4)]
    return int(np.argmin(onset))


@pytest.mark.parametrize("kind", diagnostic.KINDS)
def test_the_evidence_decides_the_label(samples: dict[str, list[RawSample]], kind: str) -> None:
    audio, video, truth = of_kind(samples["test"], kind)
    found = np.array([decode(kind, a, v) for a, v in zip(audio, video, strict=True)])
    assert (found == truth).mean() > 0.99


@pytest.mark.parametrize(
    ("kind", "blank"), [("cross-modal", "audio"), ("cross-modal", "video"), ("local", "audio"), ("long-range", "video")]
)
def test_without_its_modality_a_kind_cannot_be_told(samples: dict[str, list[RawSample]], kind: str, blank: str) -> None:
    audio, video, truth = of_kind(samples["test"], kind)
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(truth))  # another sample's stream in its place
    audio, video = (audio[shuffled], video) if blank == "audio" else (audio, video[shuffled])
    found = np.array([decode(kind, a, v) for a, v in zip(audio, video, strict=True)])
    assert (found == truth).mean() < bound(len(truth))


def test_kinds_labels_and_languages_are_even(samples: dict[str, list[RawSample]]) -> None:
    counts = Counter((s.kind, s.label) for s in samples["test"])
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 1
    zh = np.mean([s.language == "zh" for s in samples["test"]])
    assert 0.45 < zh < 0.55


def test_generation_is_a_function_of_variant_seed_and_size(tmp_path: Path) -> None:
    sizes = {"train": 24, "valid": 12, "test": 12}
    made = [
        diagnostic.generate("diagnostic", tmp_path / f"{i}", seed=seed, sizes=sizes) for i, seed in enumerate((3, 3, 4))
    ]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    opened = open_dataset(tmp_path / "0")
    assert opened.task == BUILT_IN["diagnostic"]
    assert set(opened["train"].kinds() or []) == set(diagnostic.KINDS)
    diagnostic.generate("diagnostic-regression", tmp_path / "r", sizes=sizes)
    assert set(open_dataset(tmp_path / "r")["train"].targets()) == set(diagnostic.LEVELS)
    with pytest.raises(ValueError, match="too few samples"):
        diagnostic.generate("diagnostic", tmp_path / "x", sizes={"test": 5})
    with pytest.raises(ValueError, match="no generated task"):
        diagnostic.generate("diagnostics", tmp_path / "x")


def test_what_is_there_already_is_recognised_by_its_record_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    assert not diagnostic.is_generated("diagnostic", data)
    sizes = {"train": 24, "valid": 12, "test": 12}
    diagnostic.generate("diagnostic", data, sizes=sizes)
    assert not diagnostic.is_generated("diagnostic", data)  # of another size
    monkeypatch.setattr(diagnostic, "SIZES", sizes)
    assert diagnostic.is_generated("diagnostic", data)
    assert not diagnostic.is_generated("diagnostic-regression", data)
    diagnostic.generate("diagnostic", tmp_path / "other", seed=1, sizes=sizes)
    assert not diagnostic.is_generated("diagnostic", tmp_path / "other")
    diagnostic.generate("diagnostic", tmp_path / "raw", sizes=sizes, standardise="none")
    assert not diagnostic.is_generated("diagnostic", tmp_path / "raw")
    arrow = next(data.glob("train/*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-1])
    assert not diagnostic.is_generated("diagnostic", data)
