"""Small datasets for tests of the run: a label written in text and audio, ragged lengths, missing modalities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.preparation.prepare import prepare_source
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import get_task

WIDTHS = {"audio": 6, "video": 5}
WORDS = ("red", "green", "blue", "white", "grey", "black", "pink")


def toy_source(name: str, sizes: dict[str, int], seed: int = 0, huge: tuple[str, ...] = ()) -> Source:
    """Samples of task `name`: the label's word in half of the texts, its number in the audio's mean.

    The samples `huge` have features so large, though finite, that a layer overflows on them.
    """
    task = get_task(name)
    answers = task.answers()

    def samples(split: str) -> Iterator[RawSample]:
        rng = np.random.default_rng([seed, len(split)])
        for i in range(sizes[split]):
            k = int(rng.integers(len(answers)))
            word = WORDS[k % len(WORDS)] if i % 2 else "nothing"
            frames, images = int(rng.integers(2, 12)), int(rng.integers(1, 6))
            audio = rng.normal(k % 4, 0.5, (frames, WIDTHS["audio"])) if i % 5 else None
            video = rng.normal(0, 1.0, (images, WIDTHS["video"])) if i % 7 else None
            if f"{split}-{i:04d}" in huge:
                audio = np.full((frames, WIDTHS["audio"]), 3e38)
            label: Any = task.grid.values[k] if task.grid is not None else task.labels[k % len(task.labels)]
            if task.kind == "multilabel":
                label = [name for j, name in enumerate(task.labels) if (k + i) >> j & 1]
            elif "shares" in task.name and i % 3:
                label = {task.labels[k]: 2, task.labels[(k + 1) % len(task.labels)]: 1}
            yield RawSample(
                id=f"{split}-{i:04d}",
                split=split,
                text=f"{word} {' so'.join([''] * int(rng.integers(1, 9)))} 说 {i % 10}",
                label=label,
                audio=audio,
                video=video,
                audio_length=None,
                video_length=None,
                dialogue=f"d{i // 4}",
                turn=i % 4,
                speaker=f"speaker {i % 2}",
            )

    return Source(
        name="toy",
        samples=samples,
        splits=list(sizes),
        files=[],
        widths=WIDTHS,
        rates={"audio": 10.0, "video": 5.0},
        notes=[],
    )


def prepare_toy(
    name: str,
    folder: Path,
    train: int = 48,
    valid: int = 13,
    test: int = 11,
    seed: int = 0,
    huge: tuple[str, ...] = (),
) -> Path:
    """A prepared toy dataset in `folder`/`name`; of a task that a YAML file defines under the task's name.

    A task called "shares" has annotators that disagree on two samples of three.
    """
    out = folder / get_task(name).name
    sizes = {"train": train, "valid": valid, "test": test}
    prepare_source(get_task(name), toy_source(name, sizes, seed, huge), out)
    return out
