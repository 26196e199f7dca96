"""Combinations of stage, quantisation and offload that docs/clusters.md calls refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config import load_config
from trainer.distributed.deepspeed_config import check_machine

TINY = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"
ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.zero=0", "train.offload=cpu"), "an optimizer in host memory needs ZeRO"),
        (("train.zero=2", f"{ZERO}.offload_param.device=cpu"), "offload_param needs train.zero=3, not 2"),
        (("train.zero=3", f"{ZERO}.offload_param.device=nvme"), "nvme is not supported"),
        (("train.zero=3", f"{ZERO}.mics_shard_size=2"), "mics_shard_size is not supported"),
        (
            ("train.zero=3", "model.backbone.quantization=nf4", f"{ZERO}.zero_quantized_weights=true"),
            "would quantise the packed weights",
        ),
        (
            ("train.zero=3", "model.backbone.quantization=nf4", f"{ZERO}.zero_quantized_nontrainable_weights=true"),
            "would quantise the packed weights",
        ),
        (("train.zero=3", "model.fusion.compile=true"), "compile=true does not go with train.zero=3"),
        (("train.precision=fp16",), "needs a GPU"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_starts(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_machine(load_config(TINY, overrides), torch.device("cpu"))


def test_all_faults_are_in_one_message() -> None:
    wrong = ("train.zero=0", "train.offload=cpu", "train.precision=fp16", f"{ZERO}.mics_shard_size=2")
    with pytest.raises(ValueError, match="host memory") as refused:
        check_machine(load_config(TINY, wrong), torch.device("cpu"))
    assert len(str(refused.value).splitlines()) >= 3


def test_full_training_of_4_bit_weights_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="cannot train a quantised backbone"):
        load_config(TINY, ("model.backbone.quantization=nf4", "model.adapter.kind=full"))
