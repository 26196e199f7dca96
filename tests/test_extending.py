"""docs/extending.md holds what it says: its examples are run as they stand there."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.distributed.processes import ROOT, egmf
from tests.toy import prepare_toy
from trainer.data.dataset import open_dataset
from trainer.data.readers.raw import ReaderError
from trainer.data.readers.registry import known_readers, reader_of
from trainer.data.readers.source import open_source
from trainer.plugins import PluginError
from trainer.tasks import get_task

FOUR = ["local", "semantic", "global", "rhythm"]


def example(file: str) -> str:
    """The Python block of the page that begins with the docstring of this file."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf'```python\n("""{re.escape(file)}:.*?)```', page, re.S)
    return str(found)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, the fourth expert's file, and the config that the page shows."""
    folder = tmp_path_factory.mktemp("extending")
    prepare_toy("meld", folder)
    (folder / "rhythm.py").write_text(example("rhythm.py"), encoding="utf-8")
    (folder / "four.yaml").write_text(
        f"""
extends: {ROOT}/configs/tiny.yaml
task: meld
data: {{path: "{folder}/{{task}}"}}
model:
  backbone: {{tiny: {{vocab_size: 400}}}}
  fusion: {{plugins: ["{folder}/rhythm.py"], experts: [local, semantic, global, rhythm], expert_loss_weight: 0.3}}
train: {{steps: 4, global_batch: 8, micro_batch: 4, eval_every: 2, save_every: 2, log_every: 1, probe: false}}
track: {{mlflow: false, system_metrics: false, report: false}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    """A run of two ranks with the fourth expert, stopped at its first checkpoint and continued."""
    command = ("launch", "local", "--procs", "2", str(work / "four.yaml"), "--out", str(work / "run"))
    plants = {"PYTHONPATH": f"{ROOT}/tests/distributed/failing:{ROOT}", "EGMF_TEST_STOP": "1:save"}
    stopped = egmf(*command, **plants)
    assert stopped.returncode == 85, stopped.stderr
    assert "stopped at step 2 of 4" in stopped.stderr
    continued = egmf(*command, "track.report=true")
    assert continued.returncode == 0, continued.stderr
    return work / "run"


def weights_sum_to_one(rows: pd.DataFrame) -> None:
    expert_NE = np.array(rows["gate_expert"].tolist())
    assert expert_NE.shape == (len(rows), 4)
    np.testing.assert_allclose(expert_NE.sum(1), 1.0, atol=1e-5)
    modality = np.array([[list(inner) for inner in outer] for outer in rows["gate_modality"]])
    assert modality.shape == (len(rows), 4, 3)
    assert (expert_NE[:, 3] > 0.05).all()


@pytest.mark.distributed
def test_a_fourth_expert_trains_stops_continues_and_is_seen_everywhere(work: Path, run: Path) -> None:
    whole = egmf("launch", "local", "--procs", "2", str(work / "four.yaml"), "--out", str(work / "whole"))
    assert whole.returncode == 0, whole.stderr
    for name in ("metrics.json", "checkpoints/step-00000004/model.safetensors"):
        assert (run / name).read_bytes() == (work / "whole" / name).read_bytes(), name

    weights_sum_to_one(pd.read_parquet(run / "predictions/test.parquet"))
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    logged = {name for line in journal for name in line.get("metrics", {})}
    assert {f"gate/{name}" for name in FOUR} <= logged
    assert "rhythm" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.distributed
def test_evaluate_and_predict_find_the_expert_again(work: Path, run: Path, tmp_path: Path) -> None:
    scored = egmf("evaluate", str(run), "--json", "--predictions", str(tmp_path / "again.parquet"))
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout) == json.loads((run / "metrics.json").read_text())["test"]["meld"]
    table = pd.read_parquet(run / "predictions/test.parquet")
    weights_sum_to_one(pd.read_parquet(tmp_path / "again.parquet"))

    samples = list(open_dataset(work / "meld")["test"])
    lines: list[dict[str, Any]] = [{"id": s.id, "text": s.text} for s in samples if s.audio_TF is None]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    moved = tmp_path / "elsewhere" / "rhythm.py"
    moved.parent.mkdir()
    (work / "rhythm.py").rename(moved)
    command = (
        "predict",
        str(run),
        "--input",
        str(tmp_path / "in.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
        "--gates",
    )
    lost = egmf(*command)
    assert lost.returncode != 0
    assert f"there is no file {work / 'rhythm.py'}" in lost.stderr
    assert "model.fusion.plugins=[" in lost.stderr
    answered = egmf(*command, f"model.fusion.plugins=[{moved}]")
    moved.rename(work / "rhythm.py")
    assert answered.returncode == 0, answered.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    assert set(rows[0]["gate_expert"]) == set(FOUR) == set(rows[0]["gate_modality"])
    assert len(table) > len(rows) > 0


def test_the_default_stays_at_three_and_unknown_names_get_the_nearest(work: Path, tmp_path: Path) -> None:
    from trainer.config import ConfigError, check_config
    from trainer.models.fusion.selection import expert_classes

    plugins = [str(work / "rhythm.py")]
    default = check_config({"task": "meld", "model": {"fusion": {"plugins": plugins}}}).model.fusion
    assert list(expert_classes(default)) == ["local", "semantic", "global"]
    config = check_config({"task": "meld", "model": {"fusion": {"plugins": plugins, "experts": ["rhythm", "global"]}}})
    assert list(expert_classes(config.model.fusion)) == ["global", "rhythm"]
    with pytest.raises(ConfigError, match=r"experts\.0: must be 'local', .* not 'rhythm'"):
        check_config({"task": "meld", "model": {"fusion": {"experts": ["rhythm"]}}})
    typo = check_config({"task": "meld", "model": {"fusion": {"plugins": plugins, "experts": ["rythm"]}}})
    with pytest.raises(ValueError, match=r"no expert is registered as 'rythm'; did you mean rhythm\?"):
        expert_classes(typo.model.fusion)
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"broken\.py cannot be imported: ModuleNotFoundError"):
        expert_classes(check_config({"task": "meld", "model": {"fusion": {"plugins": [str(broken)]}}}).model.fusion)
    taken = tmp_path / "taken.py"
    taken.write_text(example("rhythm.py").replace('"rhythm"', '"local"'))
    with pytest.raises(ValueError, match="two experts are named 'local'"):
        expert_classes(check_config({"task": "meld", "model": {"fusion": {"plugins": [str(taken)]}}}).model.fusion)


# ── a format ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tsv(work: Path, tmp_path: Path) -> Path:
    """The reader's file from the page, and the dataset's samples in its format."""
    (tmp_path / "tsv_reader.py").write_text(example("tsv_reader.py"), encoding="utf-8")
    opened = open_dataset(work / "meld")
    with (tmp_path / "clips.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["id", "split", "text", "label", "audio"])
        for split in opened.splits:
            for sample in opened[split]:
                name = "" if sample.audio_TF is None else f"{sample.id}.npy"
                if sample.audio_TF is not None:
                    np.save(tmp_path / name, sample.audio_TF)
                table.writerow([sample.id, split, sample.text, opened.task.labels[int(sample.target)], name])
    return tmp_path


@pytest.mark.distributed
def test_a_format_is_prepared_listed_and_predicted(work: Path, run: Path, tsv: Path) -> None:
    source, plugin = str(tsv / "clips.tsv"), ("--plugin", str(tsv / "tsv_reader.py"))
    unknown = egmf("prepare", "meld", "--source", source, "--out", str(tsv / "data"))
    assert unknown.returncode == 1
    assert "clips.tsv: is none of .jsonl, .csv, .pkl, .pickle" in unknown.stderr
    done = egmf("prepare", "meld", "--source", str(tsv), "--out", str(tsv / "data"), "--workers", "2", *plugin)
    assert done.returncode == 0, done.stderr
    made, truth = open_dataset(tsv / "data"), open_dataset(work / "meld")
    assert made.record["source"]["name"] == "samples in a table"
    assert list(made.record["source"]["files"]) == ["clips.tsv"]
    for split in truth.splits:
        for found, wanted in zip(made[split], truth[split], strict=True):
            assert (found.id, found.text, found.target) == (wanted.id, wanted.text, wanted.target)
            assert (found.audio_TF is None) == (wanted.audio_TF is None)
            if wanted.audio_TF is not None:
                np.testing.assert_array_equal(found.audio_TF, wanted.audio_TF)

    summary = egmf("data", "show", str(tsv / "data"), "--json")
    assert {split: entry["n"] for split, entry in json.loads(summary.stdout).items()} == {
        split: len(truth[split]) for split in truth.splits
    }

    answered = egmf("predict", str(run), "--input", source, "--out", str(tsv / "out.jsonl"), "--split", "test", *plugin)
    assert answered.returncode == 0, answered.stderr
    rows = [json.loads(line) for line in (tsv / "out.jsonl").read_text().splitlines()]
    samples = list(truth["test"])
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    lines: list[dict[str, Any]] = [{"id": s.id, "text": s.text} for s in samples]
    for line, sample in zip(lines, samples, strict=True):
        if sample.audio_TF is not None:
            line["audio"] = f"{sample.id}.npy"
    (tsv / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    same = egmf("predict", str(run), "--input", str(tsv / "in.jsonl"), "--out", str(tsv / "same.jsonl"))
    assert same.returncode == 0, same.stderr
    assert (tsv / "same.jsonl").read_text() == (tsv / "out.jsonl").read_text()


def test_faults_of_a_format_and_of_its_file_are_reported(tsv: Path) -> None:
    plugin = str(tsv / "tsv_reader.py")
    (tsv / "bad.tsv").write_text("id\tsplit\ttext\tlabel\taudio\na\ttrain\thi\tjoy\tnone.npy\nb\tx\thi\tjoy\t\n")
    (tsv / "bare.tsv").write_text("id\ttext\n")
    with pytest.raises(ReaderError) as caught:
        open_source(get_task("meld"), [tsv / "bad.tsv", tsv / "bare.tsv"], plugins=[plugin])
    for wanted in (
        "bad.tsv line 2: none.npy: [Errno 2]",
        "bad.tsv: the reader TSV gives a split 'x', not train, valid or test",
        "bare.tsv: has no column audio, label, split",
    ):
        assert wanted in str(caught.value)
    whole = example("tsv_reader.py")
    for name, content, wanted in (
        ("nothing.py", "import csv\n", "defines no subclass of"),
        ("taken.py", whole.replace('name = "TSV"', 'name = "pickle"'), "the name 'pickle' is taken by"),
        ("text.py", whole.replace('(".tsv",)', '".tsv"'), "suffixes is a tuple such as"),
        ("lacks.py", whole.replace('    title = "samples in a table"\n', ""), "lacks title"),
        ("broken.py", "import nothing_of_that_name\n", r"broken\.py cannot be imported: ModuleNotFoundError"),
    ):
        (tsv / name).write_text(content, encoding="utf-8")
        with pytest.raises(PluginError, match=wanted):
            open_source(get_task("meld"), [tsv / "clips.tsv"], plugins=[str(tsv / name)])


def test_a_plugin_is_asked_before_the_package_for_a_suffix_of_both(tsv: Path) -> None:
    """A reader of another `.csv` layout takes the files that it recognises, and leaves MELD's to MELD's."""
    whole = example("tsv_reader.py").replace('(".tsv",)', '(".csv",)')
    whole += "\n    def recognise(self, path):\n        return path.read_bytes().startswith(b'id\\t')\n"
    (tsv / "own_csv.py").write_text(whole, encoding="utf-8")
    (tsv / "clips.tsv").rename(tsv / "clips.csv")
    header = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\n"
    (tsv / "train_sent_emo.csv").write_text(header + "Hi,Ann,joy,0,0\n")
    readers = known_readers((str(tsv / "own_csv.py"),))
    assert [reader.name for reader in readers] == ["JSON lines", "MELD CSV", "MMSA CSV", "pickle", "TSV"]
    assert [str(reader_of(tsv / f"{stem}.csv", readers)) for stem in ("clips", "train_sent_emo")] == [
        "TSV (.csv)",
        "MELD CSV (.csv)",
    ]
