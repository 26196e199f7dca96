"""Baselines of a prepared dataset: which there are, their fit on train, the choice on valid, their scores and their folder.

Shapes: N samples, C answers of the task.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from trainer.answers.metrics import compute
from trainer.answers.prediction_table import (
    PredictionRow,
    SampleAnswer,
    label_shares,
    predictions_table,
    write_predictions,
)
from trainer.answers.scores import SplitScores, TaskScores, metric_value
from trainer.baselines.features import Ngrams, StreamFeatures, TextFeatures, default_ngrams, statistics
from trainer.config import MODALITIES, Modality
from trainer.data.dataset import PreparedDataset, SplitView
from trainer.data.folds import FoldRecord
from trainer.data.readers.raw import ALL
from trainer.distributed.versions import git_state
from trainer.files import write_json
from trainer.label_sets import decode_sets, encode_sets
from trainer.run.folder import RESULTS, hold
from trainer.run.record import RECORD, BaselineValues, RecordValues, now, read_record
from trainer.tasks import Task

CONSTANT = "constant"
SPLITS = ("valid", "test")
C, ALPHA = 1.0, 1.0  # fixed unless tuned; larger C and smaller alpha: less regularised
C_GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
ALPHA_GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
MINIMUM = 10  # training samples
_STEPS = 1000
_VERSIONS = ("egmf-trainer", "scikit-learn", "scipy", "numpy")

Features: TypeAlias = Any  # [N, columns], a numpy array or a sparse matrix of scipy, which has no types


class BaselineError(ValueError):
    """A baseline that the data do not allow, or a folder that may not be written; the message lists every fault."""


@dataclass(frozen=True)
class Spec:
    """A baseline: what it reads (nothing: the constant answer), the n-grams of text, whether C or alpha is chosen on valid."""

    modalities: tuple[Modality, ...]
    ngrams: Ngrams
    tune: bool = False
    usual: bool = True  # the n-grams are those of the task's language

    @property
    def name(self) -> str:
        parts = ["+".join(self.modalities) or CONSTANT]
        parts += [] if self.usual or "text" not in self.modalities else [self.ngrams]
        return "-".join([*parts, *(["tuned"] if self.tune and self.modalities else [])])


@dataclass
class Baseline:
    """A fitted baseline: split -> rows and scores. `record` is what its run.json says of it."""

    spec: Spec
    task: Task
    rows: dict[str, list[PredictionRow]]
    scores: dict[str, SplitScores]
    record: BaselineValues
    started: str
    fold: FoldRecord | None = None


def specs(
    data: PreparedDataset, asked: Sequence[str] = (), ngrams: Ngrams | None = None, *, tune: bool = False
) -> list[Spec]:
    """The baselines that are asked for, each as modalities joined by commas, or ``constant``.

    By default those that the training data allow: the constant answer, each modality alone, and all of them joined. Of a dataset
    with folds of which none is chosen, those that all its samples allow.

    Raises:
        BaselineError: an unknown modality.
    """
    usual = default_ngrams(data.task.language)
    there = _present(data[ALL] if data.folds and data.fold is None else data["train"])
    alone: list[tuple[Modality, ...]] = [(name,) for name in there]
    chosen = [(), *alone, *([there] if len(there) > 1 else [])]
    if asked:
        words = [[] if text == CONSTANT else text.split(",") for text in asked]
        unknown = sorted({word for names in words for word in names if word not in MODALITIES})
        if unknown:
            raise BaselineError(
                f"--modalities: {', '.join(map(repr, unknown))} is none of {', '.join(MODALITIES)}; join several by commas, "
                f"or give {CONSTANT} alone"
            )
        chosen = [tuple(name for name in MODALITIES if name in names) for names in words]
    made = [Spec(names, ngrams or usual, tune, (ngrams or usual) == usual) for names in chosen]
    return list(dict.fromkeys(made))


def fit_baseline(data: PreparedDataset, spec: Spec) -> Baseline:
    """Fit on train, choose on valid where `spec` says so, and score valid and test.

    Classification: multinomial logistic regression (L2, C = 1), or one of two classes for each label where a sample has several.
    Regression: ridge (alpha = 1). The constant answer is the majority class with the training shares as probabilities, the labels
    of at least half of the samples, or the training mean. Source: scikit-learn.

    Raises:
        BaselineError: the data do not allow it; every reason in one message.
    """
    started, task = now(), data.task
    check_data(data, [spec])
    features = _features(data, spec)
    target_N = data["train"].targets()
    setting = "alpha" if task.kind == "regression" else "C"
    target = decode_sets(target_N, len(task.labels)) if task.kind == "multilabel" else target_N
    grid: Sequence[float] = (C if setting == "C" else ALPHA,)
    if spec.tune and spec.modalities:
        grid = C_GRID if setting == "C" else ALPHA_GRID
    tried: dict[str, float | None] = {}
    best: tuple[float, float, Any] | None = None
    for value in grid:
        model = _model(task, spec, value).fit(features["train"], target)
        found = _score(task, data["valid"], *_answers(task, model, features["valid"]))
        score = metric_value(found, task.select)
        tried[f"{value:g}"] = score
        goodness = -np.inf if score is None else score if task.greater_is_better else -score
        if best is None or goodness > best[0]:
            best = goodness, value, model
    assert best is not None
    rows, scores = {}, {}
    for split in SPLITS:
        value_N, p_NC = _answers(task, best[2], features[split])
        rows[split] = list(_rows(task, data[split], value_N, p_NC))
        scores[split] = {task.name: _score(task, data[split], value_N, p_NC)}
    record: BaselineValues = {
        "name": spec.name,
        "model": type(best[2]).__name__,
        "modalities": list(spec.modalities),
        "ngrams": spec.ngrams if "text" in spec.modalities else None,
        "setting": setting if spec.modalities else None,
        "value": best[1] if spec.modalities else None,
        "tried": tried if spec.tune and spec.modalities else {},
        "data": str(data.path),
    }
    fold: FoldRecord | None = None
    if data.fold is not None and data.choice is not None:
        fold = {"name": data.fold, "names": data.folds, "train": len(data["train"]), "test": len(data["test"])}
        record["fold_valid"] = data.choice.valid
        if data.choice.valid != "next":
            record["fold_seed"] = data.choice.seed
    return Baseline(spec, task, rows, scores, record, started, fold)


def check_data(data: PreparedDataset, wanted: Sequence[Spec]) -> None:
    """Refuse data on which the baselines cannot be fitted.

    Raises:
        BaselineError: every reason in one message.
    """
    if faults := data_faults(data, wanted):
        raise BaselineError("\n  ".join([f"no baseline of {data.path}: {len(faults)} fault(s)", *faults]))


def data_faults(data: PreparedDataset, wanted: Sequence[Spec]) -> list[str]:
    """Why the baselines cannot be fitted on the data; empty where they can."""
    faults = [f"it has no split {split}" for split in ("train", *SPLITS) if split not in data.splits]
    if "train" in data.splits and any(spec.modalities for spec in wanted):
        train = data["train"]
        target_N = train.targets()
        if len(train) < MINIMUM:
            faults.append(f"train has {len(train)} samples, and a baseline needs at least {MINIMUM}: add samples")
        if len(np.unique(target_N)) == 1:
            what = {"classification": "one class", "multilabel": "one set of labels"}.get(data.task.kind, "one number")
            faults.append(f"all samples of train have {what}, so that nothing can be learnt: --modalities {CONSTANT}")
        there = _present(train)
        absent = [name for name in MODALITIES if any(name in spec.modalities for spec in wanted) and name not in there]
        faults += [f"no sample of train has {name}: leave it out of --modalities" for name in absent]
    return faults


def write_baseline(baseline: Baseline, fingerprint: str, out: Path, *, force: bool = False) -> None:
    """Write ``predictions/``, ``metrics.json`` and ``run.json`` into `out`; the record comes last, so that it says done.

    Raises:
        BaselineError: `out` holds anything but a baseline, or another one and not `force`.
        ValueError: it cannot be written.
    """
    check_out(out, baseline.record, baseline.fold, force=force)
    with hold(out):
        (out / RECORD).unlink(missing_ok=True)
        for split, rows in baseline.rows.items():
            write_predictions(predictions_table(rows), out / "predictions" / f"{split}.parquet")
        write_json(out / "metrics.json", baseline.scores)
        record: RecordValues = {
            "state": "done",
            "baseline": baseline.record,
            "started": baseline.started,
            "ended": now(),
            "failure": None,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
            "platform": platform.platform(),
            "device": f"cpu x {len(os.sched_getaffinity(0))} threads",
            "git": git_state(),
            "command": sys.argv,
            "host": socket.gethostname(),
            "world": 1,
            "tasks": [baseline.task.name],
            "data": {baseline.task.name: fingerprint},
        }
        if baseline.fold is not None:
            record["fold"] = baseline.fold
        write_json(out / RECORD, record)


def check_out(
    out: Path, baseline: BaselineValues | None = None, fold: FoldRecord | None = None, *, force: bool = False
) -> None:
    """Refuse a folder that holds a run, or (once there is a `baseline`) another one, or one of another `fold`, without `force`.

    Raises:
        BaselineError: see there.
    """
    if out.exists() and not out.is_dir():
        raise BaselineError(f"{out} is a file: choose another folder with --out")
    found = (read_record(out) or {}) if out.is_dir() else {}
    before = found.get("baseline")
    if before is None and out.is_dir() and any(path for pattern in RESULTS for path in out.glob(pattern)):
        raise BaselineError(f"{out} holds a run and no baseline: choose another folder with --out")
    if baseline is not None and before is not None and (before, found.get("fold")) != (baseline, fold) and not force:
        of_fold = f" of fold {found['fold']['name']}" if "fold" in found else ""
        raise BaselineError(
            f"{out} holds the baseline {before.get('name')}{of_fold}: --force replaces it, --out names another"
        )


def _present(train: SplitView) -> tuple[Modality, ...]:
    """The modalities that any sample of train has."""
    has = {"text": any(text and text.strip() for text in train.texts())}
    has |= {name: bool(train.frames(name).any()) for name in ("audio", "video")}
    return tuple(name for name in MODALITIES if has[name])


def _features(data: PreparedDataset, spec: Spec) -> dict[str, Features]:
    """Split -> [N, columns]: the columns of the modalities side by side."""
    columns: dict[str, list[Features]] = {split: [] for split in ("train", *SPLITS)}
    for modality in spec.modalities:
        if modality == "text":
            texts = {split: [text or "" for text in data[split].texts()] for split in columns}
            try:
                text_features = TextFeatures(spec.ngrams).fit(texts["train"])
            except ValueError as error:  # of scikit-learn, where no n-gram is left
                raise BaselineError(
                    f"no baseline of text in {data.path}: no n-gram is in two texts of train"
                ) from error
            for split, listed in texts.items():
                columns[split].append(text_features.transform(listed))
        else:
            streams = {split: statistics(data[split], modality) for split in columns}
            stream_features = StreamFeatures(joined=len(spec.modalities) > 1).fit(streams["train"])
            for split, values in streams.items():
                columns[split].append(stream_features.transform(values))
    return {split: _joined(blocks, len(data[split])) for split, blocks in columns.items()}


def _joined(blocks: Sequence[Features], samples: int) -> Features:
    if not blocks:
        return np.zeros((samples, 1))
    if len(blocks) == 1:
        return blocks[0]
    if not any(sparse.issparse(block) for block in blocks):
        return np.hstack(blocks)
    return sparse.csr_matrix(sparse.hstack([sparse.csr_matrix(block) for block in blocks]))


def _model(task: Task, spec: Spec, value: float) -> Any:
    if task.kind == "multilabel":
        one = LogisticRegression(C=value, max_iter=_STEPS) if spec.modalities else DummyClassifier(strategy="prior")
        return OneVsRestClassifier(one)
    if task.kind == "classification":
        return LogisticRegression(C=value, max_iter=_STEPS) if spec.modalities else DummyClassifier(strategy="prior")
    return Ridge(alpha=value) if spec.modalities else DummyRegressor()


def _answers(task: Task, model: Any, features: Features) -> tuple[np.ndarray, np.ndarray | None]:
    """[N] label indices, and [N, C] probabilities (0 for a class that train lacks); sets of labels, and [N, C] that each label
    applies; or numbers, without probabilities."""
    if task.kind == "regression":
        return np.asarray(model.predict(features), dtype=np.float64), None
    if task.kind == "multilabel":
        p_NC = np.asarray(model.predict_proba(features), dtype=np.float64)
        return encode_sets(p_NC >= 0.5), p_NC
    p_NC = np.zeros((features.shape[0], len(task.labels)))
    p_NC[:, model.classes_.astype(int)] = model.predict_proba(features)
    return p_NC.argmax(axis=1).astype(np.float64), p_NC


def _score(task: Task, view: SplitView, value_N: np.ndarray, p_NC: np.ndarray | None) -> TaskScores:
    target_N = view.targets()
    return compute(task, target_N, value_N, p_NC, label_shares(task, target_N, view.shares()))


def _rows(task: Task, view: SplitView, value_N: np.ndarray, p_NC: np.ndarray | None) -> Iterator[PredictionRow]:
    kinds = view.kinds() or [None] * len(view)
    rows = zip(view.ids, kinds, view.targets().tolist(), view.shares(), strict=True)
    for i, (name, kind, target, shares) in enumerate(rows):
        value = float(value_N[i])
        prediction = task.word(value)
        answer = SampleAnswer(value, prediction, True, str(prediction), None if p_NC is None else p_NC[i].tolist())
        yield PredictionRow(task.name, name, task.word(target), kind, target, answer, shares)
