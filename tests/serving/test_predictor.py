"""A predictor answers as the evaluation and `egmf predict` do, bit by bit, in any number of threads and from streams of any length."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import trainer
from tests.distributed.processes import environment
from tests.serving.conftest import ROOT, TASKS
from tests.toy import WIDTHS
from trainer import Predictor
from trainer.data.dataset import open_dataset
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.layouts import PackedLayout
from trainer.results.predict import Options, predict
from trainer.run.saved import SavedRun
from trainer.serving.prediction import Prediction, Prepared, Rejected, SampleError


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.load(run)


@pytest.fixture(scope="module")
def samples(run: Path) -> list[dict[str, Any]]:
    """The prepared test splits as dictionaries."""
    found = []
    for name in TASKS:
        for sample in open_dataset(run.parent / name)["test"]:
            one: dict[str, Any] = {"id": sample.id, "text": sample.text, "task": name, "speaker": sample.speaker}
            one |= {"dialogue": sample.dialogue, "turn": sample.turn}
            one |= {key: value for key in ("audio", "video") if (value := getattr(sample, f"{key}_TF")) is not None}
            found.append(one)
    return found


def plain(answers: Any) -> list[dict[str, Any]]:
    return [one.plain() for one in answers]


def test_equal_to_the_evaluation_bit_by_bit(run: Path, predictor: Predictor, samples: list[dict[str, Any]]) -> None:
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    expected = {(row.task, row.id): row for row in table.itertuples()}
    found = predictor.predict(samples)
    assert [(one.task, one.id) for one in found] == [(sample["task"], sample["id"]) for sample in samples]
    for one in found:
        row = expected[one.task, one.id]
        prediction = one.prediction if isinstance(one.prediction, str) else repr(one.prediction)
        assert (prediction, one.valid, one.answer) == (row.prediction, row.valid, row.answer)
        assert one.probabilities is not None
        assert one.gate_expert is not None
        assert one.gate_modality is not None
        assert list(one.probabilities) == list(predictor.tasks[one.task].answers())
        assert list(one.probabilities.values()) == list(row.probabilities)
        assert one.gate_expert == dict(zip(("local", "semantic", "global"), row.gate_expert, strict=True))
        assert [list(of.values()) for of in one.gate_modality.values()] == [list(w) for w in row.gate_modality]


def test_equal_to_the_command(
    predictor: Predictor, opened: SavedRun, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines = []
    for n, sample in enumerate(samples):
        line = dict(sample)
        for key in ("audio", "video"):
            if key in line:
                np.save(tmp_path / f"{n}-{key}.npy", line[key])
                line[key] = f"{n}-{key}.npy"
        lines.append(json.dumps(line))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    predict(opened, [tmp_path / "in.jsonl"], out, Options(probabilities=True, gates=True), report=print)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert plain(predictor.predict(samples)) == written
    assert plain(predictor.stream(iter(samples))) == written
    assert json.loads(json.dumps(plain(predictor.predict(samples)), allow_nan=False)) == written


def test_eight_threads_get_what_one_gets(run: Path, samples: list[dict[str, Any]]) -> None:
    """Also on first use, when prefixes are not there yet."""
    parts = [samples[k::8] for k in range(8)]
    for part in parts:  # a dialogue is looked for within a call
        for sample in part:
            sample.pop("dialogue", None)
    alone = [plain(Predictor.load(run).predict(part)) for part in parts[:1]]
    shared = Predictor.load(run)
    ready = threading.Barrier(8)

    def ask(part: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        ready.wait()
        return [plain(shared.predict(part)) for _ in range(4)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, parts))
    assert answers[0][0] == alone[0]
    for part, repeated in zip(parts, answers, strict=True):
        assert repeated == [plain(shared.predict(part))] * 4


def test_the_prefix_of_a_task_passes_the_backbone_once(
    run: Path, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, made = Predictor.load(run), []
    whole = Backbone.prefix
    monkeypatch.setattr(Backbone, "prefix", lambda self, *a, **k: made.append(len(a[0])) or whole(self, *a, **k))
    for _ in range(3):
        predictor.predict(samples)
        list(predictor.stream(samples))
    assert len(made) == len(TASKS)


def test_batches_keep_to_the_budget_of_tokens(
    run: Path, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [{"text": f"word {'so ' * (n % 9)}", "task": "meld"} for n in range(40)]
    wide = Predictor.load(run, overrides=["eval.batch=null"])
    narrow = Predictor.load(run, tokens=300, overrides=["eval.batch=null"])
    sizes: list[int] = []
    packed = Backbone.packed

    def measured(self: Backbone, embeds_TH: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(embeds_TH))
        return packed(self, embeds_TH, *args, **options)

    monkeypatch.setattr(Backbone, "packed", measured)
    prepared = [one for one in narrow.prepare(texts) if isinstance(one, Prepared)]
    costs = [one.cost for one in prepared]
    found = narrow.answer(prepared)
    assert len(sizes) > 1
    assert max(sizes) <= 300
    assert sum(sizes) == sum(costs)
    for a, b in zip(found, wide.predict(texts), strict=True):
        assert a.prediction == b.prediction
        np.testing.assert_allclose(list(a.probabilities.values()), list(b.probabilities.values()), atol=1e-5)


def test_pseudo_tokens_are_those_that_the_backbone_reads(
    predictor: Predictor, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    insert = PackedLayout.insert

    def noted(self: PackedLayout, embeds: torch.Tensor, pseudo_BKH: torch.Tensor) -> torch.Tensor:
        row = insert(self, embeds, pseudo_BKH)
        read.extend(row[places] for places in self.batch.place_BK)
        names.extend(self.batch.ids)
        return row

    names: list[str] = []
    monkeypatch.setattr(PackedLayout, "insert", noted)
    chosen = [sample for sample in samples if sample["task"] == "meld"]
    found = predictor.predict(chosen, pseudo_tokens=True)
    inserted = dict(zip(names, read, strict=True))
    config = predictor.opened.config
    for one in found:
        assert one.pseudo_KH is not None
        assert one.pseudo_KH.shape == (config.model.fusion.pseudo_tokens, config.model.backbone.tiny.hidden_size)
        assert one.pseudo_KH.dtype == np.float32
        np.testing.assert_array_equal(one.pseudo_KH, inserted[one.id].numpy())
        assert one.plain()["pseudo_tokens"] == one.pseudo_KH.tolist()
    assert plain(predictor.predict(chosen)) == [
        {key: value for key, value in line.items() if key != "pseudo_tokens"} for line in plain(found)
    ]


def test_a_stream_has_answers_and_refusals_in_their_order(predictor: Predictor) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        n = 0
        while True:
            yield {"id": f"s{n}", "text": "" if n % 3 == 1 else f"text {n}", "task": "meld"}
            n += 1

    stream = predictor.stream(endless())
    found = [next(stream) for _ in range(1100)]
    stream.close()
    assert [one.id for one in found] == [f"s{n}" for n in range(1100)]
    assert [type(one) for one in found[:3]] == [Prediction, Rejected, Prediction]
    assert str(found[1]) == "samples[1]: no text, audio or video"
    assert str(found[1000]) == "samples[1000]: no text, audio or video"


def test_memory_does_not_grow_with_a_stream(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.serving.predictor.CHUNK_SAMPLES", 16)

    def peak(n: int) -> int:
        rows = ({"id": f"{i:070d}", "text": f"number {i:05d}", "task": "meld"} for i in range(n))
        tracemalloc.start()
        assert sum(isinstance(one, Prediction) for one in predictor.stream(rows)) == n
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = min(peak(64), peak(64))  # the first time, modules are loaded
    assert peak(480) - few < 250_000  # the answers alone would be several times that


def test_histories_are_those_of_the_dialogue(predictor: Predictor) -> None:
    said = [{"text": f"said {n}", "dialogue": 1, "turn": n, "speaker": "Ann", "task": "meld"} for n in range(4)]
    prepared = predictor.prepare(said[::-1])
    histories = [one.sample.history for one in prepared if isinstance(one, Prepared)]
    assert histories == [
        [("Ann", "said 1"), ("Ann", "said 2")],
        [("Ann", "said 0"), ("Ann", "said 1")],
        [("Ann", "said 0")],
        [],
    ]
    alone = predictor.prepare(said[3:])
    assert isinstance(alone[0], Prepared)
    assert alone[0].sample.history == []
    assert plain(predictor.stream(said)) == plain(predictor.predict(said))


def test_a_stream_remembers_dialogues_across_its_parts(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"text": f"said {n}", "dialogue": n % 2, "task": "meld"} for n in range(9)]
    whole = predictor.predict(said)
    monkeypatch.setattr("trainer.serving.predictor.CHUNK_SAMPLES", 2)
    monkeypatch.setattr("trainer.results.answering.CHUNK_SAMPLES", 2)
    for a, b in zip(predictor.stream(said), whole, strict=True):
        assert isinstance(a, Prediction)
        np.testing.assert_allclose(list(a.probabilities.values()), list(b.probabilities.values()), atol=1e-5)
    repeated = list(predictor.stream([{"id": "a", "text": "x", "task": "meld"}] * 3))
    assert isinstance(repeated[0], Prediction)
    assert [one.faults for one in repeated[1:] if isinstance(one, Rejected)] == [
        ("duplicate id ('a' is that of samples[0])",)
    ] * 2


def test_what_cannot_be_answered_is_told_at_once(predictor: Predictor) -> None:
    with pytest.raises(
        SampleError, match=r"(?s)2 of 3 samples cannot be answered:.*samples\[0\]: .*samples\[2\]"
    ) as error:
        predictor.predict([{"id": "a", "text": " ", "task": "meld"}, {"text": "b", "task": "meld"}, {"text": "c"}])
    assert [(one.id, one.where) for one in error.value.rejected] == [
        ("a", "samples[0]"),
        ("sample-00003", "samples[2]"),
    ]
    assert error.value.rejected[1].faults == ("names no task, the run has meld, simsv2",)
    with pytest.raises(SampleError, match="and 5 more"):
        predictor.predict([{"text": ""}] * 25, task="meld")
    for wrong in ({"text": "one"}, "clip.mp4"):
        with pytest.raises(ValueError, match=r"put it into a list, as in predict\(\[sample\]\)"):
            predictor.predict(wrong)
    with pytest.raises(ValueError, match="task 'mosei' is none of the model's: meld, simsv2"):
        predictor.stream([], task="mosei")
    assert predictor.predict([]) == []
    assert list(predictor.stream([])) == []


def test_an_answer_says_what_was_repaired_in_its_sample(predictor: Predictor) -> None:
    nothing = {"text": "a", "task": "meld", "audio": np.full((3, WIDTHS["audio"]), np.nan)}
    good, repaired = predictor.predict([{"text": "a", "task": "meld"}, nothing])
    assert (good.notes, repaired.notes) == ((), ("no finite frame in audio: counted as missing",))
    assert repaired.probabilities == pytest.approx(good.probabilities, abs=1e-5)


def test_the_package_stays_light_until_a_predictor_is_asked_for() -> None:
    code = "import sys, trainer; assert 'torch' not in sys.modules; print(dir(trainer).__len__() > 0, trainer.__all__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Predictor" in done.stdout
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Predicter'"):
        trainer.Predicter  # noqa: B018
    assert trainer.Predictor is Predictor


def test_what_is_not_given_cannot_be_asked_for(run: Path) -> None:
    generating = Predictor.load(run, overrides=["eval.mode=generate"])
    (answer,) = generating.predict([{"text": "red", "task": "meld"}])
    assert (answer.probabilities, answer.gate_expert, answer.gate_modality) == (None, None, None)
    with pytest.raises(ValueError, match="pseudo_tokens: answers are generated without them"):
        generating.predict([], pseudo_tokens=True)
    opened = generating.opened
    with pytest.raises(ValueError, match="a predictor answers on one process, and this model is opened on 2"):
        Predictor(replace(opened, world=replace(opened.world, size=2)))
