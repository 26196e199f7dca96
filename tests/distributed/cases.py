"""The cases of the two-process tests, and what one of them does: a few steps, then an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.checkpoint.identity import RunIdentity
from trainer.checkpoint.state import CheckpointState, LossMonitorState, Position, SelectionState
from trainer.config import RunConfig, load_config

TINY = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"
STEPS = 4
PLANTED = 1


@dataclass(frozen=True)
class Case:
    """A run: `overrides` change what is computed (on a single process and on ranks), `engine` only how.

    `plant` puts a non-finite loss or gradient into step `PLANTED`, on the last rank only.
    """

    name: str
    overrides: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()
    plant: Literal["loss", "gradient"] | None = None

    @property
    def computed(self) -> tuple[tuple[str, ...], bool]:
        """What decides the numbers."""
        return self.overrides, self.plant is not None


COMMON = (
    "train.global_batch=10",
    "train.micro_batch=4",
    f"train.steps={STEPS}",
    "train.warmup=0.25",
    "train.clip=0.5",
    "train.weight_decay=0.1",
    "model.fusion.gate.balance_weight=0.1",
    "model.fusion.expert_loss_weight=0.3",
    "model.backbone.tiny.vocab_size=400",
    "data.modality_dropout=0.3",
    "eval.batch=4",
    "track.mlflow=false",
)
NF4 = ("model.backbone.quantization=nf4",)
BF16 = ("train.precision=bf16",)
CHECKPOINTED = ("model.backbone.gradient_checkpointing=true",)
ON_HOST = ("deepspeed.zero_optimization.offload_param.device=cpu",)
TWO = ("task=[meld,simsv2]",)
LABEL_TASKS = {  # several labels a sample, and shares of annotators
    "sets": "{name: sets, kind: multilabel, labels: [joy, anger, sad, fear]}",
    "shares": "{name: shares, kind: classification, labels: [joy, anger, sad, fear]}",
}
LABELS = ("task=[{data}/sets.yaml,{data}/shares.yaml]",)
ONE_EXPERT = ("model.fusion.experts=[local]",)  # where the backbone and the engine matter, not the fusion network

CASES = (
    *(Case(f"zero{z}", (), (f"train.zero={z}",)) for z in range(4)),
    *(Case(f"zero{z}-nf4", NF4, (f"train.zero={z}",)) for z in range(4)),
    *(Case(f"zero{z}-nf4-bf16", (*NF4, *BF16), (f"train.zero={z}",)) for z in range(4)),
    Case("zero3-nf4-reentrant", NF4, ("train.zero=3", *CHECKPOINTED, "model.backbone.reentrant=true")),
    Case("zero3-nf4-rank0", NF4, ("train.zero=3", "model.backbone.read=rank0")),
    Case("zero2-nf4-rank0", NF4, ("train.zero=2", "model.backbone.read=rank0")),
    Case("zero3-full", ("model.adapter.kind=full",), ("train.zero=3",)),
    Case("zero2-two-tasks", TWO, ("train.zero=2",)),
    Case("zero3-two-tasks-checkpointing", (*TWO, *NF4), ("train.zero=3", "model.backbone.gradient_checkpointing=true")),
    Case("zero2-labels", (*LABELS, "train.loss=constrained"), ("train.zero=2",)),
    Case("zero3-labels-checkpointing", (*LABELS, *NF4, "train.label_smoothing=0.1"), ("train.zero=3", *CHECKPOINTED)),
    Case("zero2-full", ("model.adapter.kind=full",), ("train.zero=2",)),
    Case("zero3-no-fusion", ("model.fusion.pseudo_tokens=0",), ("train.zero=3",)),
    Case(
        "zero3-raw-keys",
        (),
        ("train.zero=0", "deepspeed.zero_optimization.stage=3", "deepspeed.gradient_accumulation_steps=3"),
    ),
    *(Case(f"zero{z}-bad-gradient", ONE_EXPERT, (f"train.zero={z}",), "gradient") for z in range(4)),
    *(
        Case(f"zero{z}-bad-gradient-bf16", (*ONE_EXPERT, *NF4, *BF16), (f"train.zero={z}",), "gradient")
        for z in range(4)
    ),
    *(Case(f"zero{z}-bad-loss", ONE_EXPERT, (f"train.zero={z}",), "loss") for z in (0, 3)),
    *(Case(f"zero{z}-bad-loss-bf16", (*ONE_EXPERT, *NF4, *BF16), (f"train.zero={z}",), "loss") for z in (1, 2)),
)
QUICK = {  # of CASES: every stage, precision, quantisation, kind of training and of fault once; `make test` runs these
    "zero0", "zero1-nf4", "zero2-nf4-bf16", "zero3-nf4-rank0", "zero3-full", "zero3-two-tasks-checkpointing",
    "zero3-bad-gradient-bf16", "zero0-bad-loss",
}  # fmt: skip
assert {case.name for case in CASES} > QUICK

CHECKPOINTING = {"": (), "-checkpointing": CHECKPOINTED, "-reentrant": (*CHECKPOINTED, "model.backbone.reentrant=true")}
OFFLOAD = {"": (), "-optimizer": ("train.offload=cpu",), "-parameters": ON_HOST}
SUPPORTED = tuple(  # the table in docs/clusters.md; what is left out here is refused
    Case(
        f"zero{z}{q}{offload}{checkpointing}",
        (*ONE_EXPERT, *(NF4 if q else ())),
        (f"train.zero={z}", *OFFLOAD[offload], *more),
    )
    for z in range(4)
    for q in ("", "-nf4")
    for offload in OFFLOAD
    for checkpointing, more in CHECKPOINTING.items()
    if z == 3 or not offload or (offload == "-optimizer" and z > 0)
)
WEIGHED = ("train.class_weights=inverse", "train.label_smoothing=0.1", "data.sampling=sqrt")
OBJECTIVES = (
    Case("zero2-weighed", (*ONE_EXPERT, *WEIGHED), ("train.zero=2",)),
    Case(
        "zero3-weighed-numbers",
        (*ONE_EXPERT, "task=simsv2", *WEIGHED, "train.regression_loss=0.7", *NF4),
        ("train.zero=3",),
    ),
    Case(
        "zero2-weighed-two-tasks",
        (*TWO, "train.class_weights=effective", "train.regression_loss=0.7", "eval.score=full"),
        ("train.zero=2", *CHECKPOINTED),
    ),
    *(
        Case(
            f"zero{z}-constrained", (*TWO, "train.loss=constrained", "train.regression_loss=0.7"), (f"train.zero={z}",)
        )
        for z in (2, 3)
    ),
)
SETS = {
    "quick": tuple(case for case in CASES if case.name in QUICK),
    "rest": tuple(case for case in CASES if case.name not in QUICK),
    "supported": SUPPORTED,
    "objectives": OBJECTIVES,
}


def config_of(case: Case, data: Path, *, engine: bool) -> RunConfig:
    overrides = [override.replace("{data}", str(data)) for override in case.overrides]
    return load_config(
        TINY, ["task=meld", f"data.path={data}/{{task}}", *COMMON, *overrides, *(case.engine if engine else ())]
    )


def backbone_of(config: RunConfig, out: Path) -> Path:
    """The folder in which runs of the config's tasks keep their offline backbone."""
    return out / "-".join(Path(task).stem for task in config.tasks)


def state_at(step: int, best: str | None = None, identity: RunIdentity | None = None) -> CheckpointState:
    """What a run of this identity, or of a made-up one, writes beside its weights after `step` steps."""
    identity = identity or RunIdentity(tasks=["meld"], data={"meld": "0"}, base="0", world=1, zero=0, settings={})
    return CheckpointState(
        **identity.model_dump(), step=step, best=best, selection=SelectionState(best=best, validations={}, nll={}),
        health=LossMonitorState(), position=Position(step=step),
    )  # fmt: skip
