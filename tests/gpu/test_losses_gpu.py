"""Smoothed and regression-aware losses on a GPU, against the same in float32 on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.answer_tree import Score
from trainer.answers.tree import task_tree
from trainer.batch import Sample
from trainer.config import AdapterConfig, BackboneConfig, DataConfig, TinyConfig
from trainer.data.collate import Collator
from trainer.data.objective import Objective
from trainer.models.backbone.causal_lm import build_backbone, build_tiny
from trainer.models.egmf import EGMF
from trainer.tasks import BUILT_IN

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TEXTS = ["so happy", "what on earth are you doing there", "no", "I know! I know, I know."]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("loss", "score"), [("full", "full"), ("full", "constrained"), ("constrained", "constrained")])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_losses_and_gradients_are_those_of_the_cpu(
    tmp_path: Path, layout: str, dtype: torch.dtype, tolerance: float, loss: Score, score: Score
) -> None:
    build_tiny(TinyConfig(vocab_size=400), [*TEXTS, "-1.0 0.3"], tmp_path)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        torch.manual_seed(0)
        backbone = build_backbone(
            BackboneConfig(name=str(tmp_path)), AdapterConfig(rank=4, dropout=0.0), kind, torch.device(device)
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in backbone.named_parameters():
            if "lora" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model = EGMF(backbone, None).train()
        tree = task_tree(BUILT_IN["mosei"], backbone.tokenizer, "words", "en")
        collate = Collator(
            BUILT_IN["mosei"], backbone.tokenizer, DataConfig(), widths={}, rates={}, pseudo_tokens=0,
            modalities=("text",), objective=Objective(np.linspace(0.5, 2.0, 61, dtype=np.float32), 0.1, 1.0, tree, loss=loss, score=score),
        )  # fmt: skip
        sample_list = [Sample(f"s{i}", text, (i - 1) / 2) for i, text in enumerate(TEXTS)]
        batch = copy.deepcopy(collate.pack(sample_list) if layout == "packed" else collate(sample_list)).to(
            device, kind
        )
        loss_B = model(batch).loss_B
        (loss_B * batch.weight_B).sum().backward()
        gradient = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
        found[device] = loss_B.detach().cpu(), gradient
    (want, wanted), (got, given) = found["cpu"], found["cuda"]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert float((given - wanted).norm() / wanted.norm()) < 4 * tolerance
