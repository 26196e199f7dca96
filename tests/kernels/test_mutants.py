"""Every mutant of the Triton kernels is caught by the trials of test_interpreter.py."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.kernels.test_interpreter import interpret

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


MUTANTS = {
    "no temperature": [["(logits_C[i].to(dtype) - top) / temperature", "logits_C[i].to(dtype) - top"]],
    "no temperature in the gradient": [["- inner) / temperature", "- inner)"]],
    "sign in the softmax's gradient": [["gradient_C[i] - inner", "gradient_C[i] + inner"]],
    "largest not taken off": [["logits_C[i].to(dtype) - top)", "logits_C[i].to(dtype))"]],
    "largest of all, valid or not": [
        ["tl.where(valid_C[i], logits_C[i].to(dtype), -float", "tl.where(True, logits_C[i].to(dtype), -float"]
    ],
    "weights of what is not valid": [["raised = tl.where(valid_C[i], tl.exp(", "raised = tl.where(True, tl.exp("]],
    "sum of no weights": [["tl.maximum(total, 1.0)", "total"]],
    "mean counts everything": [["tl.where(valid_C[i], tl.zeros_like(top) + 1.0, 0.0)", "tl.zeros_like(top) + 1.0"]],
    "mean has a gradient": [["        if mean:\n            out_C", "        if False:\n            out_C"]],
    "levels' means exchanged": [["temperature, mean_modality, dtype", "temperature, mean_expert, dtype"]],
    "expert valid only if whole": [["some = some | given_C[m]", "some = some & given_C[m]"]],
    "another sample's validity": [
        [
            "row_R1 // K * (E * M) + (e * M + m), mask=here_R1, other=0) != 0,)",
            "row_R1 // (K + 1) * (E * M) + (e * M + m), mask=here_R1, other=0) != 0,)",
        ]
    ],
    "forward reads what is not valid": [["mask=inside_RD & given, other=0.0", "mask=inside_RD, other=0.0"]],
    "backward reads what is not valid": [
        ["mask=inside_RD & given, other=0.0", "mask=inside_RD & given & True, other=0.0"],
        ["mask=inside_RD & given, other=0.0", "mask=inside_RD, other=0.0"],
    ],
    "another expert's weight": [["expert_C[i // M]", "expert_C[i % E]"]],
    "modality's weight alone": [["(modality_C[i] * expert_C[i // M])", "modality_C[i]"]],
    "mean over the padded width": [["keep_dims=True) / D + eps", "keep_dims=True) / BLOCK + eps"]],
    "mean over the padded width in the gradient": [
        ["axis=1, keep_dims=True) / D\n", "axis=1, keep_dims=True) / BLOCK\n"]
    ],
    "no eps": [["/ D + eps)", "/ D)"]],
    "no weight": [["sum_RD * rstd_R1 * weight_1D", "sum_RD * rstd_R1"]],
    "gradient without weight": [
        [
            "d_norm_RD = d_mixed_RD * tl.load(weight + column_1D, mask=column_1D < D, other=0.0).to(dtype)",
            "d_norm_RD = d_mixed_RD",
        ]
    ],
    "weight's gradient without norm": [["d_mixed_RD * norm_RD, axis=0", "d_mixed_RD * sum_RD, axis=0"]],
    "weight's gradient of one program": [
        ["d_weight_parts + tl.program_id(0).to(tl.int64) * D + column_1D", "d_weight_parts + column_1D"]
    ],
    "sign in the norm's gradient": [["d_norm_RD - norm_RD * mean_R1", "d_norm_RD + norm_RD * mean_R1"]],
    "norm's gradient without mean": [["d_norm_RD - norm_RD * mean_R1", "d_norm_RD"]],
    "no rstd in the gradient": [["d_sum_RD = rstd_R1 * (", "d_sum_RD = ("]],
    "values' gradient where not valid": [
        [
            "tl.where(given, d_sum_RD * (modality_C[e * M + m] * expert_C[e]), 0.0)",
            "d_sum_RD * (modality_C[e * M + m] * expert_C[e])",
        ]
    ],
    "values' gradient without the expert": [
        ["d_sum_RD * (modality_C[e * M + m] * expert_C[e])", "d_sum_RD * modality_C[e * M + m]"]
    ],
    "experts' gradient without modalities": [
        ["d_expert += modality_C[e * M + m] * d_product", "d_expert += d_product"]
    ],
    "modalities' gradient without the expert": [["d_modality + expert_C[e] * d_product", "d_modality + d_product"]],
    "weights' own gradients forgotten": [["(d_modality + expert_C[e] * d_product,)", "(expert_C[e] * d_product,)"]],
    "columns of the first expert": [
        ["row_R1, here_R1, E * M, e * M, M)\n        weights_C", "row_R1, here_R1, E * M, 0, M)\n        weights_C"]
    ],
    "sums over rows, not columns": [
        [
            "d_product = tl.sum(d_sum_RD * tiles_C[e * M + m], axis=1",
            "d_product = tl.sum(d_sum_RD * tiles_C[e * M + m], axis=0",
        ]
    ],
}


def test_every_mutant_is_caught(tmp_path):
    (tmp_path / "mutants.json").write_text(json.dumps(MUTANTS))
    caught = interpret(str(tmp_path / "mutants.json"), str(tmp_path))
    assert len(caught) == len(MUTANTS)
    assert [name for name, how in caught.items() if how is None] == []
