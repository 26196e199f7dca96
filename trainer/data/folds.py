"""Cross-validation: which samples of a dataset with folds are training, validation and test when one fold is the test fold.

A fold is a part of the data that is tested by a model which was trained without it: a session, a speaker, a random part. Every
sample has one, so each is tested once over all folds. Shapes: N samples of the dataset.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from trainer.config import RunConfig
from trainer.data.preparation.faults import DataError
from trainer.files import plain

SHOWN = 5  # names in a message


@dataclass(frozen=True)
class FoldChoice:
    """What a run trains on. `fold`: name of the test fold, or its number from 1. `valid`: the fold after it validates, or a
    share of the dialogues of the other folds, drawn with `seed`."""

    fold: str
    valid: Literal["next"] | float = "next"
    seed: int = 0


class FoldRecord(TypedDict):
    """What a run's record says of its fold: the name, the names of all, and the samples that it trained on and tested."""

    name: str
    names: list[str]
    train: int
    test: int


def fold_choice(config: RunConfig) -> FoldChoice | None:
    """What the config asks for; None where it names no fold."""
    data = config.data
    return None if data.fold is None else FoldChoice(data.fold, data.fold_valid, config.train.seed)


def fold_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A key by which folds are sorted: numbers in names by their value, so that ``s2`` comes before ``s10``."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part)


def fold_labels(folds: Sequence[str]) -> dict[str, str]:
    """Fold -> its part of a folder's name; numbers from 1 where names are not one to one."""
    labels = {fold: f"fold={plain(fold)}" for fold in folds}
    if len(set(labels.values())) < len(labels):
        labels = {fold: f"fold={number}" for number, fold in enumerate(folds, 1)}
    return labels


def fold_sizes(folds: Iterable[str]) -> dict[str, int]:
    """Fold -> samples, in the order of the folds."""
    counts = Counter(folds)
    return {name: counts[name] for name in sorted(counts, key=fold_order)}


def cut_dialogues(places: Iterable[tuple[str | None, str | None]]) -> str | None:
    """A note on dialogues of which some samples are in one fold and some in another; None where there are none."""
    folds_of = defaultdict(set)
    for dialogue, fold in places:
        if dialogue is not None:
            folds_of[dialogue].add(fold)
    cut = [dialogue for dialogue, folds in folds_of.items() if len(folds) > 1]
    if not cut:
        return None
    shown = ", ".join(cut[:SHOWN]) + (" …" if len(cut) > SHOWN else "")
    return f"{len(cut)} of {len(folds_of)} dialogues are cut across folds, so a test fold's dialogues are trained on too: {shown}"


def find_fold(wanted: str, names: Sequence[str]) -> str:
    """The fold of this name, else of this number from 1; where all names are numbers, only the name counts.

    Raises:
        DataError: there is none; the message lists them.
    """
    if wanted in names:
        return wanted
    numbered = not all(name.isdecimal() for name in names)
    if numbered and wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return names[int(wanted) - 1]
    by_number = f", or a number from 1 to {len(names)}" if numbered else ""
    raise DataError(f"there is no fold {wanted!r}: the folds are {', '.join(names)}{by_number}")


def assign_folds(
    choice: FoldChoice,
    fold_N: np.ndarray,
    dialogues: Sequence[str | None],
    speakers: Sequence[str | None],
) -> dict[str, np.ndarray]:
    """Split -> indices of its samples, ascending.

    Test is the chosen fold. With ``valid="next"`` the fold after it in order (after the last, the first) validates. With a
    share, that share of the dialogues of the other folds does, drawn with the seed; of speakers where the data have no
    dialogues, of samples where they have neither. A sample without a dialogue counts as one of its own.

    Raises:
        DataError: no such fold, or nothing would be left to train on or to validate with.
    """
    names = list(fold_sizes(fold_N.tolist()))
    test = find_fold(choice.fold, names)
    rest = np.flatnonzero(fold_N != test)
    if choice.valid == "next":
        if len(names) < 3:
            raise DataError(
                f"with the {len(names)} folds {', '.join(names)} nothing is left to train on when the next fold validates: "
                "validate with a share of the training folds, such as data.fold_valid=0.1 (egmf baseline: --fold-valid 0.1)"
            )
        after = names[(names.index(test) + 1) % len(names)]
        return {
            "train": rest[fold_N[rest] != after],
            "valid": rest[fold_N[rest] == after],
            "test": np.flatnonzero(fold_N == test),
        }
    groups = _groups(dialogues, speakers)[rest]
    if len(set(groups.tolist())) < 2:
        raise DataError(
            f"all samples outside of fold {test} are of one dialogue or speaker, which is not cut into training and validation: "
            "use data.fold_valid=next"
        )
    from sklearn.model_selection import GroupShuffleSplit  # slow to import, and few runs need it

    draw = GroupShuffleSplit(n_splits=1, test_size=_validating(choice.valid, groups), random_state=choice.seed)
    train, valid = next(draw.split(rest, groups=groups))
    return {"train": rest[np.sort(train)], "valid": rest[np.sort(valid)], "test": np.flatnonzero(fold_N == test)}


def _validating(share: float, groups: np.ndarray) -> int:
    """How many groups validate: the share, rounded, but at least one, and one is left to train on."""
    count = len(set(groups.tolist()))
    return min(max(1, round(share * count)), count - 1)


def _groups(dialogues: Sequence[str | None], speakers: Sequence[str | None]) -> np.ndarray:
    """[N]: the number of the dialogue of each sample, else of its speaker; own numbers for samples without."""
    names = dialogues if any(name is not None for name in dialogues) else speakers
    number: dict[str | int, int] = {}
    return np.array([number.setdefault(i if name is None else name, len(number)) for i, name in enumerate(names)])
