"""The benchmarks' own parts: shapes as published, a baseline that does what it says, parts of a profile that add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoTokenizer

from benchmarks.contenders import COLUMNS, Padded, build
from benchmarks.padded import IGNORED
from benchmarks.profile import BACKWARD, MARK, by_part
from benchmarks.real_corpora import CORPORA, run_config, table
from benchmarks.shapes import SHAPES, make_backbone, make_samples
from benchmarks.speed_tables import PAGES, RESULT, ROOT, written
from benchmarks.standardisation import sequences
from trainer.config import load_config
from trainer.text import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny", 4096)


@pytest.mark.parametrize(
    ("name", "tokens", "audio", "video"), [("meld", 11.1, 55, 11), ("mosei", 19, 142, 107), ("simsv2", 15, 358, 90)]
)
def test_samples_have_the_published_shapes(folder: Path, name: str, tokens: float, audio: int, video: int) -> None:
    shape, tokenizer = SHAPES[name], AutoTokenizer.from_pretrained(folder)
    samples = make_samples(shape, 2000)
    lengths = np.array([[len(encode(tokenizer, s.text)), len(s.audio_TF), len(s.video_TF)] for s in samples])
    assert np.allclose(lengths.mean(0), (tokens, audio, video), rtol=0.06)
    assert (lengths.max(0) <= (shape.text_end, shape.audio_end, shape.video_end)).all()
    assert lengths.min() >= 1
    assert (samples[0].audio_TF.shape[1], samples[0].video_TF.shape[1]) == shape.widths
    again = make_samples(shape, 2000)[7]
    assert again.text == samples[7].text
    assert np.array_equal(again.audio_TF, samples[7].audio_TF)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_learns_and_answers(folder: Path, column: str) -> None:
    made = build(column, SHAPES["meld"], make_samples(SHAPES["meld"], 32), folder)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    assert made.step(0) == 32
    per_sample = made.positions / 32
    made.step(1)
    for name, parameter in made.model.named_parameters():
        if name in before and "missing" not in name:  # what stands for a modality that is not there: all are
            assert torch.isfinite(parameter).all(), name
            assert not torch.equal(parameter, before[name]), name
    assert made.evaluate() == 32
    fixed = 0 if not isinstance(made, Padded) else len(made.data.before) + 4 + 65 + len(made.data.after) + 2
    assert {"ours": per_sample < 32, "ours padded": 64 < per_sample < 152, "padded": per_sample == fixed}[column]


def test_the_baseline_computes_the_loss_of_the_answers_alone(folder: Path) -> None:
    """Its loss, sample by sample, written with log-probabilities of the answer behind the context."""
    made = build("padded", SHAPES["mosei"], make_samples(SHAPES["mosei"], 4), folder)
    assert isinstance(made, Padded)
    model, batch = made.model.eval(), made.data(range(4))
    with torch.no_grad():
        found = model.loss(batch)
        context = model._context(batch)
        logprobs = []
        for row, answer in zip(context, batch.answer_BA, strict=True):
            tokens = answer[answer != IGNORED]
            whole = torch.cat([row, model.embedding(tokens)])[None]
            logits = model.language_model(inputs_embeds=whole).logits[0].double().log_softmax(-1)
            logprobs += [logits[len(row) - 1 + i, token] for i, token in enumerate(tokens)]
    assert context.shape[1] == len(made.data.before) + 4 + 50 + len(made.data.after)
    torch.testing.assert_close(found.double(), -torch.stack(logprobs).mean(), atol=1e-5, rtol=1e-5)


def test_padding_in_front_of_sequences_is_taken_away(tmp_path: Path) -> None:
    """A step counts from the first at which audio or video is not 0; a clip of zeros only has no features."""
    arrays = {}
    for split in ("train", "valid", "test"):
        audio, video = np.zeros((3, 20, 2), "f4"), np.zeros((3, 20, 3), "f4")
        audio[0, 15:], video[0, 12] = 1.0, 2.0
        audio[1] = 3.0
        arrays |= {f"audio_{split}": audio, f"video_{split}": video, f"y_{split}": np.arange(9.0).reshape(3, 3) + 1}
    np.savez(tmp_path / "pom.npz", **arrays)
    made = list(sequences(tmp_path / "pom.npz", "pom"))
    assert [sample["target"] for sample, _ in made[:3]] == [1.0, 4.0, 7.0]
    assert {m: len(values) for m, values in made[0][1].items()} == {"audio": 8, "video": 8}
    assert made[0][1]["video"][0].tolist() == [2.0, 2.0, 2.0]
    assert len(made[1][1]["audio"]) == 20
    assert made[2][1] == {}


def test_the_parts_of_a_profile_add_up() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as made, record_function(MARK + "step"):
        with record_function(MARK + "outer"):
            y = x @ x
            with record_function(MARK + "inner"):
                z = y.exp()
        z.sum().backward()
    times = by_part(made.events())
    assert set(times) == {"step", "outer", "inner", "other"}  # other: the sum's backward
    spans = {e.name: e.time_range.end - e.time_range.start for e in made.events() if e.name.startswith(MARK)}
    total = sum(t["forward"] for t in times.values())
    assert total == pytest.approx(spans[MARK + "step"], rel=1e-6)
    nodes = {e.name.removeprefix(f"{BACKWARD}: "): e for e in made.events() if e.name.startswith(BACKWARD)}
    assert times["inner"]["backward"] == pytest.approx(
        nodes["ExpBackward0"].time_range.end - nodes["ExpBackward0"].time_range.start
    )
    assert times["outer"]["backward"] >= nodes["MmBackward0"].time_range.end - nodes["MmBackward0"].time_range.start


@pytest.mark.parametrize("name", CORPORA)
def test_the_config_of_a_real_corpus_is_one(tmp_path: Path, name: str) -> None:
    corpus = CORPORA[name]
    task = corpus.name
    if not isinstance(corpus.task, str):
        task = str(tmp_path / "task.yaml")
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(corpus.task, allow_unicode=True), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(corpus, task, 30)), encoding="utf-8")
    config = load_config(tmp_path / "run.yaml")
    assert (config.train.steps, config.train.eval_every, config.model.backbone.name) == (30, 15, "tiny")
    assert tuple(config.model.fusion.modalities) == corpus.modalities


def test_the_table_of_real_corpora_has_baselines_above_the_backbone() -> None:
    scores = {
        "tiny": {"wf1": {"mean": 0.5, "sd": 0.01}, "acc": {"mean": 0.6, "sd": 0.02}},
        "baseline text": {"wf1": {"mean": 0.55, "sd": None}, "acc": {"mean": None, "sd": None}},
    }
    one = {
        "modalities": ["text"],
        "samples": {"all": 11137},
        "folds": {"a": 1, "b": 2},
        "steps": 30,
        "seeds": 3,
        "scores": scores,
        "differences": [
            {"group": "tiny", "baseline": "baseline constant", "metric": "wf1", "value": 0.2, "low": 0.1, "high": 0.3},
            {
                "group": "tiny",
                "baseline": "baseline text",
                "metric": "wf1",
                "value": -0.05,
                "low": -0.08,
                "high": -0.02,
            },
        ],
    }
    assert table({"cped": one}).splitlines()[2:] == [
        "| cped | text | 11,137 in 2 folds | baseline text | wf1 0.550, acc undefined |  |",
        "|  |  |  | tiny backbone, 30 steps, 3 seeds | wf1 0.500 ± 0.010, acc 0.600 ± 0.020 | wf1 -0.050 [-0.080, -0.020] |",
    ]


def test_tables_of_speed_are_those_of_the_result() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    for name in PAGES:
        page = (ROOT / name).read_text()
        assert "<!-- benchmarks.speed_tables" in page
        assert written(page, rows) == page, name
    with pytest.raises(ValueError, match="no table 'other'"):
        written("<!-- benchmarks.speed_tables other -->\n<!-- end -->", rows)
