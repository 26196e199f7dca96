"""What only a GPU can show: the same model on CUDA as on the CPU, 4-bit and flash attention included."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.distributed.processes import egmf
from tests.toy import prepare_toy
from trainer.config import load_config
from trainer.data.sampling import Limits, micro_batches
from trainer.distributed.world import World
from trainer.run.assemble import assemble

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TINY = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"
SMALL = ("task=meld", "model.backbone.tiny.vocab_size=400", "track.mlflow=false")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_toy("meld", tmp_path_factory.mktemp("toy"))


def scores(data: Path, folder: Path, device: str, dtype: torch.dtype, *overrides: str) -> torch.Tensor:
    config = load_config(TINY, [*SMALL, f"data.path={data}", *overrides])
    parts = assemble(config, folder, World(0, 1, torch.device(device)), dtype)
    view = parts.data["meld"]["valid"]
    batch = parts.collators["meld"]([view[i] for i in range(len(view))], answers=False).to(device, dtype)
    with torch.no_grad():
        return parts.model.eval()(batch, parts.tries["meld"].to(device)).logprob_BC.cpu()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cuda_scores_as_the_cpu_does(data: Path, tmp_path: Path, quantization: str) -> None:
    chosen = (f"model.backbone.quantization={quantization}",)
    expected = scores(data, tmp_path, "cpu", torch.float32, *chosen)
    torch.testing.assert_close(scores(data, tmp_path, "cuda", torch.float32, *chosen), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(scores(data, tmp_path, "cuda", torch.bfloat16, *chosen), expected, atol=0.3, rtol=0.03)


def test_flash_attention_scores_as_sdpa_does(data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    found, expected = (
        scores(data, tmp_path, "cuda", torch.bfloat16, f"model.backbone.attention={name}")
        for name in ("flash_attention_2", "sdpa")
    )
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_micro_step_never_waits_for_the_gpu(data: Path, tmp_path: Path, layout: str) -> None:
    config = load_config(TINY, [*SMALL, f"data.path={data}", f"data.layout={layout}"])
    device = torch.device("cuda")
    parts = assemble(config, tmp_path, World(0, 1, device), torch.bfloat16)
    view, collate, model = parts.data["meld"]["train"], parts.collators["meld"], parts.model.train()
    limits = Limits.of_training(config, "cuda")
    micro = micro_batches(range(24), collate.sizes(view), limits, 0, 1)[0]
    batch = collate.training([view[i] for i in micro.indices], micro, 0).pin_memory().to(device, torch.bfloat16)
    for watched in (False, True):  # the first pass compiles and allocates
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            output = model(batch)
            (output.loss_B.sum() + output.auxiliary_B.sum() + output.unused_param_zero).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_trains_on_a_gpu(data: Path, tmp_path: Path, precision: str) -> None:
    overrides = (
        f"data.path={data}",
        f"train.precision={precision}",
        "model.backbone.quantization=nf4",
        "train.steps=4",
    )
    done = egmf("train", str(TINY), *SMALL, *overrides, "--out", str(tmp_path / "run"), DS_ACCELERATOR="cuda")
    assert done.returncode == 0, done.stderr


def test_a_run_that_lost_its_last_checkpoint_continues_on_a_gpu(data: Path, tmp_path: Path) -> None:
    """From the step before, to the same predictions: optimizer, order of samples and dropout go on as they would have."""
    out = tmp_path / "run"
    overrides = (
        *SMALL,
        f"data.path={data}",
        "train.precision=bf16",
        "model.backbone.quantization=nf4",
        "train.steps=4",
        "train.save_every=2",
        "train.eval_every=4",
    )
    found = []
    for _ in range(2):
        done = egmf("train", str(TINY), *overrides, "--out", str(out), DS_ACCELERATOR="cuda")
        assert done.returncode == 0, done.stderr
        table = pd.read_parquet(out / "predictions" / "valid.parquet")
        found.append(torch.tensor(np.stack(table["probabilities"])))
        last = max((out / "checkpoints").glob("step-*"))
        assert last.name.endswith("4")
        shutil.rmtree(last)
        shutil.rmtree(out / "predictions")
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=1e-2)
