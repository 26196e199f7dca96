"""Non-finite steps, spikes, and batches that do not fit: found, reported, and survived by a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.processes import ROOT, egmf
from tests.toy import prepare_toy
from trainer.checkpoint.state import LossMonitorState
from trainer.data.dataset import open_dataset
from trainer.distributed.world import World
from trainer.run.assemble import assemble
from trainer.run.guards.dump import load_batch, save_batch
from trainer.run.guards.guard import LossMonitor
from trainer.run.guards.probe import MemoryFault, memory_explained

TINY = f"{ROOT}/configs/tiny.yaml"
SMALL = ("task=meld", "train.global_batch=8", "train.micro_batch=4", "train.log_every=1", "model.backbone.tiny.vocab_size=400",
         "track.mlflow=false", "track.report=false", "eval.splits=[valid]")  # fmt: skip


def train(out: Path, data: Path, *overrides: str, **more: str) -> Any:
    return egmf("train", TINY, "--out", str(out), *SMALL, f"data.path={data}/{{task}}", *overrides, **more)


def test_spikes_stand_far_above_the_recent_median() -> None:
    rng = np.random.default_rng(0)
    losses = np.concatenate([5.0 - 0.03 * np.arange(100), np.full(100, 2.0)]) + rng.normal(0, 0.05, 200)
    losses[[5, 60, 150]] += (9.0, 9.0, 0.15)  # too early to know, a spike, ordinary noise
    health = LossMonitor(8.0)
    marked = []
    for i, loss in enumerate(losses):
        before = losses[max(0, i - LossMonitor.WINDOW) : i]
        median = np.median(before) if len(before) else np.nan
        spread = 1.4826 * np.median(np.abs(before - median)) if len(before) else np.nan
        expected = len(before) >= LossMonitor.LEAST and loss > median + 8.0 * max(spread, LossMonitor.FLOOR)
        assert health.step(float(loss), False) == expected
        marked += [i] * int(expected)
    assert marked == [60]
    again = LossMonitor(8.0)
    again.restore(LossMonitorState.model_validate_json(health.state().model_dump_json()))
    assert again.state() == health.state()


def test_among_losses_near_zero_small_ones_are_no_spikes() -> None:
    health = LossMonitor(8.0)
    assert not any(health.step(1e-4 * (1 + i % 3), False) for i in range(32))
    assert not health.step(0.05, False)  # 500 times the others, and still a good answer
    assert health.step(0.5, False)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN
        (RuntimeError("std::bad_alloc"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to fill"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("alloc"), False),
    ],
)
def test_only_what_memory_caused_is_explained_by_it(error: Exception, memory: bool) -> None:
    with (
        pytest.raises((MemoryFault, type(error))) as raised,
        memory_explained("the batch", "train.micro_tokens", 64, 20),
    ):
        raise error
    assert isinstance(raised.value, MemoryFault) == memory
    assert memory or raised.value is error
    if memory:
        output = str(raised.value)
        assert output.startswith("the batch does not fit into memory: " + (str(error) or "MemoryError"))
        assert "train.micro_tokens=10 (now 64)" in output


def test_a_saved_batch_is_the_batch(tmp_path: Path) -> None:
    from trainer.config import load_config

    prepare_toy("meld", tmp_path)
    config = load_config(TINY, [*SMALL, f"data.path={tmp_path}/{{task}}"])
    parts = assemble(config, tmp_path / "run", World(0, 1, torch.device("cpu")), torch.float32)
    view = open_dataset(tmp_path / "meld")["train"]
    batch = parts.collators["meld"]([view[i] for i in range(5)])
    save_batch(batch, tmp_path / "batch.safetensors")
    back = load_batch(tmp_path / "batch.safetensors")
    assert back.ids == batch.ids
    with torch.no_grad():
        torch.testing.assert_close(parts.model(back).loss_B, parts.model(batch).loss_B, rtol=0, atol=0)


def test_the_longest_samples_make_the_largest_batch(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path)
    view = open_dataset(tmp_path / "meld")["train"]
    samples = list(view)
    most = [max(len(s.text) for s in samples)]
    most += [max(len(x) for s in samples if (x := getattr(s, f"{m}_TF")) is not None) for m in ("audio", "video")]
    for n in (3, 7, 48, 100):
        chosen = view.longest(n)
        assert len(set(chosen)) == len(chosen) == min(n, len(samples))
        found = [max(len(samples[i].text) for i in chosen)]
        found += [
            max(len(x) for i in chosen if (x := getattr(samples[i], f"{m}_TF")) is not None) for m in ("audio", "video")
        ]
        assert found == most


@pytest.mark.distributed
@pytest.mark.slow
def test_a_bad_sample_is_reported_before_training_or_skipped(tmp_path: Path) -> None:
    view = open_dataset(prepare_toy("meld", tmp_path / "plain"))["train"]
    longest = view[view.longest(4)[0]].id
    prepare_toy("meld", tmp_path, huge=(longest,))
    raw = "model.fusion.standardise=false"  # standardised features are cut, and overflow nowhere
    refused = train(tmp_path / "a", tmp_path, "train.steps=6", raw)
    assert refused.returncode == 1, refused.stderr
    assert "Traceback" not in refused.stderr
    assert "before any training" in refused.stderr
    assert longest in refused.stderr
    done = train(tmp_path / "b", tmp_path, "train.steps=6", "train.probe=false", raw)
    assert done.returncode == 0, done.stderr
    assert "skipped: non-finite loss or gradient (1 in all)" in done.stderr
    assert longest in done.stderr
    state = json.loads((tmp_path / "b/checkpoints/step-00000006/state.json").read_text())
    assert state["health"]["skipped"] == 1


@pytest.mark.distributed
def test_too_many_in_a_row_stop_the_run_and_can_be_replayed(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path, huge=tuple(f"train-{i:04d}" for i in range(48)))
    raw = "model.fusion.standardise=false"
    stopped = train(tmp_path / "run", tmp_path, "train.steps=6", "train.probe=false", "train.max_skipped=2", raw)
    assert stopped.returncode == 1, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "was not finite in 2 steps in a row" in stopped.stderr
    folder = tmp_path / "run/nonfinite/step-00000002"
    assert f"egmf replay {folder}" in stopped.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "failed"
    about = json.loads((folder / "about.json").read_text())
    assert len(about["samples"]) == 8
    assert set(about["samples"]) == {name for micro in about["micro_batches"] for name in micro["losses"]}
    again = egmf("replay", str(folder))
    assert again.returncode == 0, again.stderr
    assert "rank0.micro0" in again.stdout
    assert "fusion.encoders" in again.stdout.replace("\n", "").replace(" ", "")  # features overflow in their encoder


@pytest.mark.distributed
def test_a_batch_larger_than_memory_is_an_error_with_the_setting_to_change(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path, train=1500)
    done = train(
        tmp_path / "run", tmp_path, "train.global_batch=1500", "train.micro_batch=600", "train.micro_tokens=99999", "train.steps=1",
        EGMF_TEST_MEMORY="200", PYTHONPATH=f"{ROOT}/tests/distributed/failing:{ROOT}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = re.search(r"task meld: the largest micro-batch \(600 samples, (\d+) positions, up to 11 audio", done.stderr)
    assert found, done.stderr
    assert "does not fit into memory" in done.stderr
    assert f"train.micro_tokens={int(found[1]) // 2} (now 99999)" in done.stderr  # what it held, not what it might


def test_an_overflow_counts_apart_and_is_no_step_of_the_others() -> None:
    health = LossMonitor(8.0)
    health.step(1.0, True)
    assert not health.step(50.0, False, overflowed=True)
    assert (health.skipped, health.in_a_row, health.overflowed) == (1, 1, 1)
    other = LossMonitor(8.0)
    other.restore(health.state())
    assert other.state() == health.state()


def test_fp16_begins_at_a_scale_of_its_own_and_other_precisions_know_none() -> None:
    from trainer.config import check_config
    from trainer.distributed.deepspeed_config import deepspeed_config

    def section(**values: object) -> object:
        return deepspeed_config(check_config({"task": "meld", **values}))["fp16"]

    assert section(train={"precision": "bf16"}) == {"enabled": False}
    assert section(train={"precision": "fp16"}) == {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    raw = section(train={"precision": "fp16"}, deepspeed={"fp16": {"initial_scale_power": 12}})
    assert raw == {"enabled": True, "initial_scale_power": 12, "hysteresis": 1}
