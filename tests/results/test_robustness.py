"""Missing and corrupted modalities: what is damaged, against loops; scores, against samples one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.distributed.processes import egmf, run_ranks
from tests.toy import prepare_toy
from trainer.answers.metrics import compute
from trainer.answers.predictions import predict
from trainer.batch import Sample
from trainer.data.dataset import open_dataset
from trainer.distributed.world import World
from trainer.results.analysis import analyse
from trainer.results.corruption import Corruption, spread_of
from trainer.results.report.report import write_report
from trainer.results.robustness import Options, check_options, robustness, write_robustness
from trainer.results.run_folder import read_run
from trainer.results.show import run_json
from trainer.run.saved import SavedRun, open_run

ROOT = Path(__file__).parent.parent.parent
WORLD = World(0, 1, torch.device("cpu"))
TASKS = ("meld", "simsv2")


def train(folder: Path, name: str, *overrides: str) -> Path:
    """A few steps on the toy data in `folder`."""
    small = (
        "train.steps=3", "model.backbone.tiny.vocab_size=400", "train.global_batch=8", "train.probe=false",
        "task=[meld,simsv2]", f"data.path={folder}/{{task}}", "track.mlflow=false", "track.report=false",
    )  # fmt: skip
    done = egmf("train", f"{ROOT}/configs/tiny.yaml", *small, *overrides, "--out", str(folder / name))
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robustness")
    for name in TASKS:
        prepare_toy(name, folder, test=24)
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return train(data, "run")


@pytest.fixture(scope="module")
def text_only(data: Path) -> Path:
    return train(data, "text", "model.fusion.pseudo_tokens=0")


@pytest.fixture(scope="module")
def opened(run: Path) -> SavedRun:
    return open_run(run, WORLD)


def clip(i: int, frames: int = 40) -> Sample:
    rng = np.random.default_rng(i)
    audio, video = (rng.normal(size=(frames, n)).astype("f4") for n in (3, 2))
    return Sample(f"s{i}", "some words", 1.0, audio, video)


def test_damage_is_of_the_sample_alone_and_grows_with_the_rate() -> None:
    clips = [clip(i) for i in range(400)]
    lost_by_rate: list[set[str]] = []
    for rate in (0.25, 0.5, 1.0):
        damage = Corruption("missing", ("audio", "video"), rate, seed=3)
        made = [damage("meld", sample) for sample in clips]
        again = {s.id: s for s in (Corruption("missing", ("audio",), rate, seed=3)("any", c) for c in reversed(clips))}
        lost = {s.id for s in made if s.audio_TF is None}
        assert lost == {i for i, s in again.items() if s.audio_TF is None}  # whatever else is damaged, in any order
        assert lost != {s.id for s in made if s.video_TF is None} or rate == 1.0
        assert len(lost) / len(clips) == pytest.approx(rate, abs=0.08)
        lost_by_rate.append(lost)
    assert lost_by_rate[0] < lost_by_rate[1] < lost_by_rate[2]
    assert all(sample.audio_TF is not None for sample in clips)  # the data themselves stay
    assert [Corruption("missing", ("text",), 1.0)("meld", c).text for c in clips[:2]] == ["", ""]
    assert Corruption("missing", ("audio",), 0.5, seed=4)("meld", clips[0]) is not None


def test_noise_has_the_features_own_deviation_on_the_frames_it_hits() -> None:
    spread = {"meld": {"audio": np.array([0.5, 2.0, 0.0]), "video": np.ones(2)}}
    changes = []
    for i in range(50):
        sample = replace(clip(i), audio_mask_T=np.arange(40) > 4)
        noisy = Corruption("noise", ("audio",), 0.3, 1, spread)("meld", sample)
        more = Corruption("noise", ("audio",), 0.9, 1, spread)("meld", sample)
        assert noisy.audio_TF is not None
        assert sample.audio_TF is not None
        assert more.audio_TF is not None
        change = noisy.audio_TF - sample.audio_TF
        hit = change.any(1)
        np.testing.assert_array_equal((more.audio_TF - sample.audio_TF)[hit], change[hit])
        assert noisy.video_TF is sample.video_TF
        assert noisy.audio_mask_T is sample.audio_mask_T
        changes.append(change)
    whole = np.concatenate(changes)
    assert whole.any(1).mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(whole[whole.any(1)].std(0), [0.5, 2.0, 0.0], rtol=0.1)


def test_dropped_frames_are_masked_and_repaired_ones_stay_so() -> None:
    sample = replace(clip(0), video_mask_T=np.arange(40) % 2 == 0)
    left = Corruption("frames", ("audio", "video"), 0.5)("meld", sample)
    assert left.audio_mask_T is not None
    assert left.video_mask_T is not None
    assert 8 < left.audio_mask_T.sum() < 32
    assert not left.video_mask_T[1::2].any()
    assert not Corruption("frames", ("audio",), 1.0)("meld", sample).audio_mask_T.any()  # type: ignore[union-attr]


def test_the_spread_is_that_of_all_frames(data: Path) -> None:
    view = open_dataset(data / "meld")["train"]
    frames = np.concatenate([s.audio_TF for s in view if s.audio_TF is not None]).astype(float)
    np.testing.assert_allclose(spread_of(view)["audio"], frames.std(0), rtol=1e-9)


def alone(opened: SavedRun, name: str, change: Callable[[Sample], Sample]) -> dict[str, float]:
    """The task's metrics, every sample by itself in a padded batch."""
    task, view = opened.parts.tasks[name], opened.parts.data[name]["test"]
    values, probabilities = [], []
    with torch.no_grad():
        for sample in view:
            batch = opened.parts.collators[name]([change(sample)], answers=False)
            output = predict(task, opened.parts.model(batch, opened.parts.tries[name]).logprob_BC)
            values.append(output.value_B[0])
            probabilities.append(output.probability_BC[0])  # type: ignore[index]
    return compute(task, view.targets(), np.array(values), np.array(probabilities))


def test_scores_are_those_of_damaged_samples_one_at_a_time(run: Path, opened: SavedRun) -> None:
    result, table = robustness(opened, Options(rates=(0.5, 1.0), modes=("missing", "noise", "frames")))
    assert result["rates"] == [0.0, 0.5, 1.0]
    clean = json.loads((run / "metrics.json").read_text())["test"]
    spread = {name: spread_of(opened.parts.data[name]["train"]) for name in TASKS}
    for name in TASKS:
        curves = {(c["mode"], c["modality"]): c["points"] for c in result["tasks"][name]["curves"]}
        assert len(curves) == 9
        for points in curves.values():
            assert points[0]["scores"]["nll"] == pytest.approx(clean[name]["nll"], rel=1e-6)
        without_both = alone(opened, name, lambda s: replace(s, audio_TF=None, video_TF=None))
        for mode in ("missing", "frames"):
            assert curves[mode, "audio+video"][2]["scores"]["nll"] == pytest.approx(without_both["nll"], rel=1e-5)
        noisy = Corruption("noise", ("audio",), 0.5, 0, spread)
        expected = alone(opened, name, lambda s, n=name, d=noisy: d(n, s))  # type: ignore[misc]
        assert curves["noise", "audio"][1]["scores"]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
        assert expected["nll"] != pytest.approx(clean[name]["nll"], rel=1e-5)
    assert len(table) == (1 + 9 * 2) * 48
    assert set(table["mode"]) == {"none", "missing", "noise", "frames"}
    few = replace_config(opened, batch=1)
    again, _ = robustness(few, Options(rates=(0.5,), modes=("noise",)))
    for name in TASKS:
        one, other = (r["tasks"][name]["curves"] for r in (again, result))
        same = next(c for c in other if (c["mode"], c["modality"]) == ("noise", "audio+video"))
        assert one[2]["points"][1]["scores"]["nll"] == pytest.approx(same["points"][1]["scores"]["nll"], rel=1e-5)


@pytest.mark.distributed
def test_two_processes_corrupt_the_same_samples(run: Path, opened: SavedRun) -> None:
    run_ranks("trainer", "robustness", str(run), "--rates", "0.5", "--modes", "noise,frames", "--seed", "5")
    both = json.loads((run / "robustness.json").read_text())
    alone, _ = robustness(opened, Options(rates=(0.5,), modes=("noise", "frames"), seed=5))
    for name in TASKS:
        one, other = (
            [p["scores"]["nll"] for c in r["tasks"][name]["curves"] for p in c["points"]] for r in (both, alone)
        )
        assert one == pytest.approx(other, rel=1e-5)
        assert len(set(np.round(one, 6))) > 3


def replace_config(opened: SavedRun, **changes: Any) -> SavedRun:
    return replace(
        opened, config=opened.config.model_copy(update={"eval": opened.config.eval.model_copy(update=changes)})
    )


def test_the_end_of_a_run_writes_what_the_report_says_of_temperature(run: Path) -> None:
    reported = json.loads((run / "calibration.json").read_text())
    assert reported["checkpoint"] == json.loads((run / "metrics.json").read_text())["checkpoint"]
    for results in analyse(read_run(run)):
        calibration = results.calibration
        assert calibration is not None
        assert reported["tasks"][results.task.name]["temperature"] == pytest.approx(calibration.temperature)
        assert reported["tasks"][results.task.name]["splits"]["test"] == pytest.approx(calibration.splits["test"])


def test_against_a_reference(run: Path, text_only: Path, opened: SavedRun, tmp_path: Path) -> None:
    result, _ = robustness(opened, Options(rates=(1.0,), modes=("missing",)), text_only)
    reference = json.loads((text_only / "metrics.json").read_text())["test"]
    for name in TASKS:
        task_result = result["tasks"][name]
        assert task_result["reference"] == pytest.approx(reference[name][task_result["metric"]])
        for point in (p for c in task_result["curves"] for p in c["points"]):
            against = point["against"]
            assert against["value"] == pytest.approx(point["scores"][task_result["metric"]] - task_result["reference"])
            assert against["low"] <= against["value"] <= against["high"]
            assert against["worse"] == (against["high"] < 0)
    with pytest.raises(ValueError, match="not read by this run, which reads text"):
        robustness(open_run(text_only, WORLD), Options())
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="other"):
        robustness(opened, Options(), other)


def test_faults_of_the_options_come_together() -> None:
    bad = Options(rates=(0.5, 1.5), modes=("mising", "noise"), modalities=("text", "smell"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mising is none of missing, noise, frames") as reported:
        check_options(bad)
    for words in ("smell is none of text, audio, video", "rates are probabilities", "text has no frames"):
        assert words in str(reported.value)


def test_the_command_puts_the_curves_into_the_report(run: Path, text_only: Path) -> None:
    done = egmf("robustness", str(run), "--rates", "0,1", "--modes", "missing", "--reference", str(text_only), "--json")
    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout)
    assert reported == json.loads((run / "robustness.json").read_text())
    table = pd.read_parquet(run / "robustness.parquet")
    assert set(table["modality"]) == {"", "audio", "video", "audio+video"}
    write_report(run)
    assert (run / "report" / "robustness-meld.png").is_file()
    page = (run / "report.html").read_text()
    assert "Missing and corrupted modalities, simsv2" in page
    assert "text scores" in page
    assert run_json(run)["tasks"]["meld"]["robustness"]["curves"][0]["mode"] == "missing"
    (run / "robustness.json").write_text(json.dumps({**reported, "checkpoint": "step-1"}))
    results = read_run(run)
    assert not results.robustness
    assert any("run egmf robustness again" in note for note in results.notes)
    write_robustness(run, reported, table)
    assert read_run(run).robustness == reported
