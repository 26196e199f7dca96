"""What runs on the fake device: every layout, attention, precision and task kind, in training, scoring and generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One pass of the offline backbone on a small dataset; `attention` is set after loading, since kernels of a GPU do not run where
    it is loaded."""

    name: str
    task: str = "meld"
    overrides: tuple[str, ...] = ()
    what: Literal["train", "score", "generate"] = "train"
    attention: str = "blocks"


NF4 = ("model.backbone.quantization=nf4",)
CHECKPOINTING = ("model.backbone.gradient_checkpointing=true",)
PADDED = ("data.layout=padded",)
REGRESSION = ("train.label_smoothing=0.1", "train.regression_loss=1.0")
EVERYTHING = (
    "model.fusion.expert_loss_weight=0.5", "model.fusion.gate.balance_weight=0.1", "data.modality_dropout=0.3",
    "model.fusion.dropout=0.1", "model.adapter.dropout=0.1", "train.label_smoothing=0.1", "train.class_weights=inverse",
)  # fmt: skip

CASES = [
    Case("packed"),
    Case("packed: everything on", overrides=EVERYTHING),
    Case("packed: checkpointing", overrides=CHECKPOINTING),
    Case("packed: reentrant checkpointing", overrides=(*CHECKPOINTING, "model.backbone.reentrant=true")),
    Case("packed: mask of the row", attention="sdpa"),
    Case("packed: varlen", attention="varlen"),
    Case("packed: log-sum-exp", overrides=("model.fusion.local_pooling=logsumexp",)),
    Case("packed: means for gates", overrides=("model.fusion.gate.modality=mean", "model.fusion.gate.expert=mean")),
    Case("packed: plain gate", overrides=("model.fusion.gate.kernel=reference",)),
    Case("packed: text only", overrides=("model.fusion.pseudo_tokens=0",)),
    Case("packed: several micro-batches", overrides=("train.micro_batch=4",)),
    Case("nf4", overrides=NF4),
    Case("nf4: checkpointing", overrides=(*NF4, *CHECKPOINTING)),
    Case("full fine-tuning", overrides=("model.adapter.kind=full",)),
    Case("frozen backbone", overrides=("model.adapter.kind=frozen",)),
    Case("fp32", overrides=("train.precision=fp32",)),
    Case("padded", overrides=PADDED),
    Case("padded: checkpointing", overrides=(*PADDED, *CHECKPOINTING)),
    Case("regression", task="mosei"),
    Case("regression: expected error", task="mosei", overrides=REGRESSION),
    Case("regression: expected error, checkpointing", task="mosei", overrides=(*REGRESSION, *CHECKPOINTING)),
    Case("regression: expected error, padded", task="mosei", overrides=(*REGRESSION, *PADDED)),
    Case("labels of a sample", task="sets"),
    Case("labels of a sample, padded", task="sets", overrides=PADDED),
    Case("labels of a sample, heads", task="sets", overrides=("model.fusion.expert_loss_weight=0.5",)),
    Case("shares of annotators", task="shares"),
    Case("shares of annotators, heads", task="shares", overrides=("model.fusion.expert_loss_weight=0.5",)),
    Case("constrained loss", overrides=("train.loss=constrained", "train.label_smoothing=0.1")),
    Case("constrained loss, padded", overrides=("train.loss=constrained", *PADDED)),
    Case("constrained loss: expected error", task="mosei", overrides=("train.loss=constrained", *REGRESSION)),
    Case("constrained loss: labels of a sample", task="sets", overrides=("train.loss=constrained",)),
    Case("full scores: expected error", task="mosei", overrides=("eval.score=full", *REGRESSION)),
    Case("Chinese", task="cherma"),
    *(
        Case(f"score: {name}", task, overrides, "score")
        for name, task, overrides in [
            ("labels", "meld", ()),
            ("numbers", "mosei", ()),
            ("labels of a sample", "sets", ()),
            ("nf4", "mosei", NF4),
            ("padded", "mosei", PADDED),
            ("labels, padded", "meld", PADDED),
            ("full", "mosei", ("eval.score=full",)),
        ]
    ),
    Case("score: varlen asked for", what="score", attention="varlen"),
    Case("generate", what="generate", overrides=("eval.mode=generate",)),
    Case("generate: answers", "mosei", ("eval.mode=generate", "eval.generation=constrained"), "generate"),
]
