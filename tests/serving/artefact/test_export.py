"""What an exported folder holds: everything that answering needs, as the checkpoint has it, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.processes import ROOT, egmf, environment
from tests.run.older import stopped_run
from tests.serving.artefact.made import WORLD, answers, sample_lines
from tests.toy import prepare_toy
from trainer.checkpoint.weights import WEIGHTS
from trainer.files import file_digest
from trainer.run.saved import SavedRun, open_run
from trainer.serving.artefact import export as module
from trainer.serving.artefact import tensors
from trainer.serving.artefact.description import ArtefactError, read_description
from trainer.serving.artefact.export import ExportOptions, export_run
from trainer.serving.locate import open_model

Copy = Callable[[Path], Path]
FORCE = ExportOptions(force=True)


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "best").read_text().strip()


def rewritten(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the weights of the chosen checkpoint, and its manifest with them."""
    place = checkpoint(run)
    state = load_file(place / WEIGHTS)
    change(state)
    save_file(state, place / WEIGHTS)
    manifest = json.loads((place / "manifest.json").read_text())
    size = (place / WEIGHTS).stat().st_size
    manifest["files"][WEIGHTS] = {"bytes": size, "sha256": file_digest(place / WEIGHTS)}
    (place / "manifest.json").write_text(json.dumps(manifest))


# ── what it answers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_answers_as_the_run_bit_for_bit(run: Path, opened: SavedRun, artefact: Path, tmp_path: Path) -> None:
    lines = [line for task in ("meld", "simsv2") for line in sample_lines(run.parent / task, task, tmp_path)]
    found = answers(open_model(artefact, WORLD), lines, tmp_path)
    assert found == answers(opened, lines, tmp_path)
    table = {(row.task, row.id): row for row in pd.read_parquet(run / "predictions" / "test.parquet").itertuples()}
    for row in found:  # and as the training's own evaluation
        assert list(row["probabilities"].values()) == list(table[row["task"], row["id"]].probabilities)


def test_it_needs_neither_the_run_nor_its_data(run: Path, artefact: Path, tmp_path: Path) -> None:
    """In a process of its own, in another folder, with the run and the data out of sight."""
    lines = sample_lines(run.parent / "meld", "meld", tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    moved = shutil.copytree(artefact, tmp_path / "elsewhere")
    hidden = run.parent.rename(run.parent.with_name("hidden"))
    try:
        command = ("predict", str(moved), "--input", str(tmp_path / "in.jsonl"), "--out", "-", "--probabilities")
        done = egmf(*command, HF_HUB_OFFLINE="1")
    finally:
        hidden.rename(run.parent)
    assert done.returncode == 0, done.stderr
    table = {
        row.id: row for row in pd.read_parquet(run / "predictions" / "test.parquet").itertuples() if row.task == "meld"
    }
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(row["probabilities"].values()) for row in rows] == [
        list(table[row["id"]].probabilities) for row in rows
    ]


def test_evaluation_says_that_it_needs_a_run(artefact: Path) -> None:
    done = egmf("evaluate", str(artefact))
    assert done.returncode == 1
    assert (
        "is an exported model, and egmf evaluate needs the run and its dataset: name the run folder (run)"
        in done.stderr
    )


# ── what it holds ────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_peft_opens_the_adapter(opened: SavedRun, artefact: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(artefact / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(artefact / "tokenizer")
    ids = tokenizer("red so 说 3", return_tensors="pt")["input_ids"]
    alone = base.eval()(ids).logits
    model = PeftModel.from_pretrained(base, str(artefact / "adapter")).eval()
    ours = opened.parts.model.backbone.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(model(ids).logits, ours)
    assert not torch.allclose(alone, ours)
    config = json.loads((artefact / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["inference_mode"]) == (16, 32.0, "none", True)


def test_every_tensor_is_that_of_the_checkpoint(run: Path, artefact: Path) -> None:
    state = load_file(checkpoint(run) / WEIGHTS)
    adapter = load_file(artefact / "adapter" / "adapter_model.safetensors")
    fusion = load_file(artefact / "fusion.safetensors")
    own = {name for name in state if "lora_" in name}
    assert len(adapter) == len(own) == 28  # two matrices of seven layers in two blocks
    for name in own:
        short = name.replace("backbone.model.", "").replace(".default.", ".")
        assert torch.equal(adapter[short], state[name])
    assert fusion.keys() == {name.removeprefix("fusion.") for name in state} - {n.removeprefix("fusion.") for n in own}
    assert all(torch.equal(value, state[f"fusion.{name}"]) for name, value in fusion.items())


def test_no_file_is_a_pickle(artefact: Path) -> None:
    kinds = {path.suffix for path in artefact.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".md", ""}
    for path in artefact.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK"), path
            assert path.stat().st_mode & 0o044, path


def test_the_description_has_tasks_prompts_and_answers(run: Path, artefact: Path) -> None:
    described = read_description(artefact)
    assert (described.run.name, described.run.seed, described.run.step) == ("run", 0, 3)
    meld, sims = described.tasks["meld"], described.tasks["simsv2"]
    assert meld.answers == [" neutral", " surprise", " fear", " sadness", " joy", " disgust", " anger"]
    assert meld.prompt.before.startswith("Recognise the emotion of the speaker in this utterance")
    assert meld.prompt.after == "</>\nEmotion:"
    assert (sims.answers[0], sims.answers[-1], len(sims.answers)) == ("-1.0", "1.0", 21)
    assert (meld.widths, meld.rates) == ({"audio": 6, "video": 5}, {"audio": 10.0, "video": 5.0})
    assert meld.samples == {"train": 48, "valid": 13, "test": 11}
    record = json.loads((run / "run.json").read_text())
    assert {name: task.fingerprint for name, task in described.tasks.items()} == record["data"]
    assert described.base.hash == record["base"]
    assert described.versions == record["versions"]
    assert (described.adapter.kind, described.adapter.pairs, described.adapter.tensors) == ("lora", 14, 28)
    text = (artefact / "egmf.json").read_text()
    assert str(run.parent) not in text  # no place of the machine
    assert "${" not in text
    assert set(described.files) == {str(p.relative_to(artefact)) for p in artefact.rglob("*") if p.is_file()} - {
        "egmf.json"
    }


def test_the_card_is_read_by_hubs_and_has_the_runs_numbers(run: Path, artefact: Path) -> None:
    card = ModelCard.load(artefact / "README.md")
    assert card.data.license_name == "see-license"
    assert card.data.language == ["en", "zh"]
    metrics = json.loads((run / "metrics.json").read_text())
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results or []}
    assert results == {
        ("meld", "wf1"): metrics["test"]["meld"]["wf1"],
        ("simsv2", "acc2"): metrics["test"]["simsv2"]["acc2"],
    }
    assert "| simsv2 | test | 11 | mae | " in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| simsv2 | valid | 13 | mae | "))
    value, low, high = (
        float(part) for part in row.split("|")[5].replace("[", " ").replace("]", " ").replace(",", " ").split()
    )
    assert value == pytest.approx(metrics["valid"]["simsv2"]["mae"], abs=1e-4)
    assert low < value < high
    assert "seed 0" in card.text
    assert "independent implementation" in card.text
    assert "random weights" in (artefact / "LICENSE").read_text()


def test_the_cards_examples_run(artefact: Path, tmp_path: Path) -> None:
    """Its Python as it stands, with the path of the folder in it."""
    text = (artefact / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    program = "\n".join(blocks).replace("PATH OF THIS FOLDER", str(artefact)).replace("PATH", str(artefact))
    done = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Prediction(id='1', task='meld'" in done.stdout


def test_intervals_are_percentiles_of_resampled_samples(run: Path, artefact: Path) -> None:
    """Computed again with pandas: the mean absolute error of the test samples, drawn as often."""
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    table = table[table["task"] == "simsv2"]
    errors = (table["prediction"].astype(float) - table["label"].astype(float)).abs().reset_index(drop=True)
    drawn = pd.Series([errors.sample(frac=1, replace=True, random_state=i).mean() for i in range(2000)])
    row = next(
        line for line in (artefact / "README.md").read_text().splitlines() if "| simsv2 | test | 11 | mae |" in line
    )
    low, high = (float(part) for part in row.split("[")[1].split("]")[0].split(","))
    assert low == pytest.approx(drawn.quantile(0.025), abs=0.03)
    assert high == pytest.approx(drawn.quantile(0.975), abs=0.03)


# ── weights that no artefact should have ─────────────────────────────────────────────────────────────────────────────


def test_an_adapter_that_training_has_not_moved_is_refused(run: Path, copy: Copy, tmp_path: Path) -> None:
    changed = copy(run)
    rewritten(changed, lambda state: [value.zero_() for name, value in state.items() if "lora_B" in name])
    with pytest.raises(
        ArtefactError,
        match=r"14 of 14 matrices lora_B are all zeros after 3 steps, so that these layers answer as without",
    ) as raised:
        export_run(changed, tmp_path / "out")
    assert "not gathered" in str(raised.value)
    assert not list(tmp_path.glob("*out*"))
    export_run(changed, tmp_path / "out", FORCE)
    assert "**Exported although it looks wrong:**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["none", "half", "more", "shape", "nan", "no fusion"])
def test_weights_that_are_not_the_configs_are_refused(kind: str, run: Path, copy: Copy, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        lora = [name for name in state if "lora_" in name]
        if kind in ("none", "half"):
            for name in lora[:: 1 if kind == "none" else 2]:
                del state[name]
        if kind == "more":
            state[lora[0].replace("layers.0", "layers.7")] = state[lora[0]].clone()
        if kind == "shape":
            state[lora[0]] = state[lora[0]][:4].clone()
        if kind == "nan":
            state[lora[1]][0] = torch.nan
        if kind == "no fusion":
            for name in [name for name in state if name.startswith("fusion.")]:
                del state[name]

    changed = copy(run)
    rewritten(changed, change)
    told = {
        "none": r"\(14 layers get LoRA\): .* is missing; .*; and 23 more",
        "half": r"is missing",
        "more": r"layers\.7.* is none of the layers that the config trains",
        "shape": r"is \(4, 256\) and not \(16, 256\)",
        "nan": r"is not finite\. --force",
        "no fusion": r"it has no fusion network, and pseudo_tokens=4",
    }
    with pytest.raises(ArtefactError, match=told[kind]):
        export_run(changed, tmp_path / "out")
    if kind != "nan":
        with pytest.raises(ArtefactError, match=told[kind]):
            export_run(changed, tmp_path / "out", FORCE)
    assert not (tmp_path / "out").exists()


def test_what_a_disk_did_not_keep_is_noticed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is read back: a bit that is lost on the way to the disk is found before the folder gets its name."""
    whole = os.fsync

    def losing(handle: int) -> None:
        size = os.fstat(handle).st_size
        os.pwrite(handle, b"?", size - 1)
        whole(handle)

    monkeypatch.setattr(tensors.os, "fsync", losing)
    with pytest.raises(ArtefactError, match=r"safetensors: .* is not what was written"):
        export_run(run, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# ── runs that cannot be exported ─────────────────────────────────────────────────────────────────────────────────────


def test_damaged_unfinished_and_empty_runs_are_refused(run: Path, copy: Copy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="is not a run folder: it has no config"):
        export_run(tmp_path, out)
    changed = copy(run)
    record = json.loads((changed / "run.json").read_text())
    (changed / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    with pytest.raises(
        ArtefactError, match=r"has not ended \(its record says stopped\): train it to its end, or export with --force"
    ):
        export_run(changed, out)
    assert export_run(changed, out, FORCE).run.step == 3
    shutil.rmtree(out)
    weights = checkpoint(changed) / WEIGHTS
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"which validation chose, is damaged: model.safetensors has changed since it was written"
    ):
        export_run(changed, out, FORCE)
    shutil.rmtree(changed / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet: train it first"):
        export_run(changed, out, FORCE)
    (changed / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        export_run(changed, out)
    assert not out.exists()


def test_data_that_were_prepared_anew_or_are_gone(run: Path, copy: Copy, tmp_path: Path) -> None:
    for name in ("meld", "simsv2"):
        prepare_toy(name, tmp_path / "other", seed=5)
    where = f"{tmp_path}/other/{{task}}"
    with pytest.raises(
        ArtefactError,
        match=r"was prepared anew since the run was trained.*name the dataset of the training with --data",
    ):
        export_run(run, tmp_path / "out", ExportOptions(data=where))
    export_run(run, tmp_path / "out", ExportOptions(data=where, force=True))
    with pytest.raises(ValueError, match="none/meld"):
        export_run(run, tmp_path / "gone", ExportOptions(data=f"{tmp_path}/none/{{task}}"))
    moved = shutil.copytree(run.parent / "meld", tmp_path / "moved" / "meld").parent
    shutil.copytree(run.parent / "simsv2", moved / "simsv2")
    export_run(run, tmp_path / "again", ExportOptions(data=f"{moved}/{{task}}"))


def test_options_that_do_not_go_together(run: Path, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError) as raised:
        export_run(run, tmp_path / "mine", ExportOptions(dtype="bf16", force=True))
    assert str(raised.value).splitlines() == [
        "--dtype is the type of the merged backbone: add --merge",
        f"{tmp_path}/mine exists and is not an exported model, so it is not replaced: choose another --out",
    ]
    assert (tmp_path / "mine" / "thesis.tex").is_file()
    with pytest.raises(ArtefactError, match="is the run's own folder, or holds it"):
        export_run(run, run.parent)
    with pytest.raises(ArtefactError, match="holds an exported model: --force replaces it"):
        export_run(run, artefact)
    for arguments, told in (
        ((str(artefact), "--out", str(tmp_path / "x")), "is an exported model, and egmf export needs the run"),
        (
            (str(run), "--out", str(tmp_path / "x"), "--merge", "--dtype", "int8"),
            "--dtype is bf16, fp16 or fp32, not 'int8'",
        ),
    ):
        done = egmf("export", *arguments)
        assert (done.returncode, told in done.stderr) == (1, True), done.stderr


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_artefact_is_replaced_whole_and_stays_where_the_new_one_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = export_run(run, out)
    again = export_run(run, out, FORCE)
    assert again.files == first.files  # byte by byte
    monkeypatch.setattr(
        module, "write_card", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(
        ArtefactError, match=r"out cannot be written: No space left on device; nothing is left of it: make room"
    ):
        export_run(run, out, FORCE)
    assert read_description(out).hash == again.hash
    with pytest.raises(ArtefactError, match="No space left"):
        export_run(run, tmp_path / "new")
    assert os.listdir(tmp_path) == ["out"]


SMALL_DISK = """
import resource, sys
from trainer.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["egmf", *sys.argv[2:]]
main()
"""


def test_a_disk_that_takes_no_more_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """The system lets files grow to 300,000 bytes: the adapter is written, the fusion network is not."""
    command = [sys.executable, "-c", SMALL_DISK, "300000", "export", str(run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out cannot be written: File too large; nothing is left of it: make room" in done.stderr
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from trainer.serving.artefact import export

def wait(*_):
    print("here", flush=True)
    time.sleep(60)

setattr(export, sys.argv[3], wait)
export.export_run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(("sign", "place"), [(signal.SIGKILL, "write_description"), (signal.SIGTERM, "write_card")])
def test_a_kill_leaves_no_folder_and_the_next_export_cleans_up(
    sign: signal.Signals, place: str, run: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(run), str(tmp_path / "out"), place]
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "here\n"
        assert not (tmp_path / "out").exists()
        assert len(list(tmp_path.glob(".out.exporting-*"))) == 1
        with pytest.raises(ArtefactError, match="another process is exporting"):
            export_run(run, tmp_path / "out")
        worker.send_signal(sign)
        worker.wait(timeout=30)
    left = list(tmp_path.iterdir())
    assert len(left) == (1 if sign is signal.SIGKILL else 0)
    export_run(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_the_command_prints_json_alone(run: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    done = egmf("export", str(run), "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hash"] == read_description(tmp_path / "out").hash
    assert "egmf.json" not in found["files"]
    assert time.monotonic() - start < 60


# ── earlier versions ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_run_of_version_0_1_answers_as_it_did(name: str, tmp_path: Path) -> None:
    """NF4, full scores (which it did not say), pieces of prompts apart; stopped, so that it takes --force."""
    run = stopped_run(name, tmp_path)
    data = f"{tmp_path}/data/{{task}}"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "score" not in config["eval"]
    described = export_run(run, tmp_path / "out", ExportOptions(force=True, data=data))
    assert (described.config["eval"]["score"], described.base.quantization) == ("full", "nf4")
    before, now = open_run(run, WORLD, data=data), open_model(tmp_path / "out", WORLD)
    assert now.config.eval.score == "full"
    assert now.parts.joining == before.parts.joining
    lines = [line for task in ("meld", "simsv2") for line in sample_lines(tmp_path / "data" / task, task, tmp_path)]
    assert answers(now, lines, tmp_path) == answers(before, lines, tmp_path)
