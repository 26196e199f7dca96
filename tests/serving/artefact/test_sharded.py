"""Runs that several processes trained under ZeRO-3, in 4 bits, are exported by one process and answer as they did; DeepSpeed #7900."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.processes import ROOT, egmf, run_ranks
from tests.serving.artefact.made import SMALL, WORLD, answers, sample_lines
from tests.toy import prepare_toy
from trainer.models.backbone.quantization import nf4_config
from trainer.run.saved import open_run
from trainer.serving.artefact.description import read_description
from trainer.serving.locate import open_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes under ZeRO-3 with NF4."""
    folder = tmp_path_factory.mktemp("sharded")
    prepare_toy("meld", folder)
    (folder / "toy.yaml").write_text(
        f"extends: {ROOT}/configs/tiny.yaml\ntask: meld\ndata: {{path: '{folder}/{{task}}'}}\n"
        "model: {backbone: {quantization: nf4}}\ntrain: {zero: 3}\n"
    )
    command = ("launch", "local", "--procs", "2", str(folder / "toy.yaml"), "--out", str(folder / "run"), *SMALL)
    done = egmf(*command)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def out(sharded: Path) -> Path:
    """The artefact, made by the command in a process that sees no GPU and no other rank."""
    done = egmf("export", str(sharded), "--out", str(sharded.parent / "out"), "--merge", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    return sharded.parent / "out"


def test_one_process_answers_as_the_run(sharded: Path, out: Path, tmp_path: Path) -> None:
    described = read_description(out)
    assert (described.run.world, described.run.zero, described.base.quantization) == (2, 3, "nf4")
    assert described.adapter.pairs == 14
    lines = sample_lines(sharded.parent / "meld", "meld", tmp_path)
    found = answers(open_model(out, WORLD), lines, tmp_path)
    assert found == answers(open_run(sharded, WORLD), lines, tmp_path)
    table = {row.id: row for row in pd.read_parquet(sharded / "predictions" / "test.parquet").itertuples()}
    for row in found:  # of the training's two processes, in other batches
        assert list(row["probabilities"].values()) == pytest.approx(list(table[row["id"]].probabilities), abs=1e-5)


def test_two_processes_open_it_with_the_backbone_in_parts(sharded: Path, out: Path, tmp_path: Path) -> None:
    lines = sample_lines(sharded.parent / "meld", "meld", tmp_path)
    source, one, two = tmp_path / "in.jsonl", tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place, name in ((sharded, one), (out, two)):
        run_two(place, source, name)
    assert two.read_text() == one.read_text()


def run_two(place: Path, source: Path, out: Path) -> None:
    run_ranks("trainer", "predict", str(place), "--input", str(source), "--out", str(out), "--probabilities", "--gates")


@torch.no_grad()
def test_peft_and_the_merged_backbone_give_the_same_logits(sharded: Path, out: Path) -> None:
    ids = AutoTokenizer.from_pretrained(out / "tokenizer")("red so 说 3", return_tensors="pt")["input_ids"]
    ours = open_run(sharded, WORLD).parts.model.backbone.model(input_ids=ids, use_cache=False).logits
    base = AutoModelForCausalLM.from_pretrained(
        out / "base", dtype=torch.float32, quantization_config=nf4_config(torch.float32, True)
    )
    model = PeftModel.from_pretrained(base, str(out / "adapter"))
    torch.testing.assert_close(model.eval()(ids).logits, ours, rtol=1e-5, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(out / "base").eval()
    assert float((plain(ids).logits - ours).abs().max()) > 0.01
    text = " ".join((out / "README.md").read_text().split())
    assert "what these 4 bits stand for (dequantised)" in text
