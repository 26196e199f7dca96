"""The schema of a run, and how a run's YAML (:mod:`trainer.config_files`) becomes one checked object.

Every fault is reported in one message, unknown keys with the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trainer.config_files import ConfigError, merge, parse_overrides, read_layers
from trainer.schema import EXECUTION, RECORD, SCORING, SELECTION, describe, dotted, is_text
from trainer.shipped import locate

Modality = Literal["text", "audio", "video"]
StopSignal = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]
STOP_SIGNALS: tuple[StopSignal, ...] = ("SIGTERM", "SIGINT", "SIGUSR1")
MODALITIES: tuple[Modality, ...] = get_args(Modality)
EXPERTS = ("local", "semantic", "global")  # built in, in the order of their places in the gate; the default

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
FoldName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]  # 2 in YAML is "2"
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A part of a config: unknown keys are faults, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


WORKERS_PER_GPU = 2


class DataConfig(Section):
    """Where prepared datasets lie and how samples become batches."""

    path: str = Field(
        "data/{task}",
        description="Prepared dataset (egmf prepare); '{task}' is replaced by the task's name, or that of all its questions.",
        json_schema_extra=EXECUTION,
    )
    prompt_language: str = Field(
        "auto",
        description="Language of the prompts, such as en or zh, in which every task must have one; auto: the task's own.",
    )
    answers: Literal["words", "indices"] = Field(
        "words", description="words: the model answers with label words; indices: with label numbers."
    )
    history: int = Field(0, ge=0, description="Previous utterances of the conversation in the prompt.")
    max_text_tokens: PositiveInt = Field(256, description="Longer texts are cut to their last tokens.")
    fold: FoldName | None = Field(
        None,
        description="Test fold of a dataset with folds (cross-validation): its name, or its number from 1; egmf sweep --folds trains all.",
    )
    fold_valid: Literal["next"] | Share = Field(
        "next",
        description="Validation with data.fold. next: the fold after the test fold, in order; a number: that share of the dialogues "
        "(else speakers, else samples) of the other folds, drawn with train.seed.",
    )
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="Micro-batch layout: packed = one unpadded row sharing one instruction; padded = one row per sample.",
        json_schema_extra=EXECUTION,
    )
    max_rate: PositiveFloat | None = Field(
        None,
        description="Frames a second to which egmf prepare --max-rate has resampled the dataset: one that was not is refused. None: any dataset.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes per rank that collate batches ahead; default: 2 on a GPU, none elsewhere.",
        json_schema_extra=EXECUTION,
    )
    modality_dropout: Fraction = Field(0.0, description="Probability of dropping audio or video of a training sample.")
    weights: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Task -> share of the steps, for several tasks."
    )
    sampling: Literal["natural", "balanced", "sqrt"] = Field(
        "natural",
        description="Sampling of training data. natural: each sample once an epoch; balanced, sqrt: drawn with replacement, "
        "classes equally often, or by the square roots of their sizes.",
    )
    mixing_temperature: Annotated[float, Field(ge=1.0, allow_inf_nan=True)] = Field(
        1.0,
        description="T: a task of n samples gets a share of the steps proportional to n^(1/T); .inf: all tasks the same share.",
    )

    def workers_of_rank(self, gpu: bool) -> int:
        """How many processes collate for a rank: as configured, or 2 on a GPU and none elsewhere."""
        return self.workers if self.workers is not None else WORKERS_PER_GPU if gpu else 0

    @model_validator(mode="after")
    def _shares(self) -> DataConfig:
        if self.weights and self.mixing_temperature != 1.0:
            raise ValueError("weights fix the tasks' shares of steps, and so does mixing_temperature: leave one out")
        return self


class TinyConfig(Section):
    """The offline backbone (`backbone.name: tiny`): a random Qwen3 and a byte-level BPE tokenizer of the task's texts."""

    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 256
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    kv_heads: PositiveInt = 1
    head_dim: PositiveInt = 64
    vocab_size: int = Field(2048, ge=300)
    initializer_range: PositiveFloat = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _sizes(self) -> TinyConfig:
        for name in ("hidden_size", "intermediate_size", "head_dim"):
            if getattr(self, name) % 64:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of 64 (the NF4 block size)")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.hidden_size * self.initializer_range < 12:
            raise ValueError(
                f"hidden_size x initializer_range = {self.hidden_size * self.initializer_range:g} must be at least 12: "
                "below that the frozen head's logits stay too small to be confident"
            )
        return self


class BackboneConfig(Section):
    """The causal language model."""

    name: str = Field("tiny", description="Hub name, folder, or 'tiny' (built locally).")
    revision: str | None = None
    attention: Literal["auto", "flash_attention_2", "varlen", "flex", "blocks", "sdpa", "eager"] = Field(
        "auto",
        description="Attention of packed rows. blocks: each sample padded to the longest, behind the shared prefix; flash_attention_2, "
        "varlen (PyTorch's own): nothing padded; flex: compiled; sdpa, eager: one mask for the row, which every family takes",
        json_schema_extra=EXECUTION,
    )
    quantization: Literal["none", "nf4"] = "none"
    double_quantization: bool = True
    read: Literal["each", "rank0"] = Field(
        "each",
        description="Who reads the weights: each rank, or rank 0 for all (where others cannot access the files).",
        json_schema_extra=EXECUTION,
    )
    gradient_checkpointing: bool = Field(False, json_schema_extra=EXECUTION)
    reentrant: bool = Field(
        False,
        description="Gradient checkpointing by autograd's older, reentrant implementation (the same gradients).",
        json_schema_extra=EXECUTION,
    )
    trust_remote_code: bool = Field(
        False, description="Run code from the model's repository: only for sources you trust."
    )
    tiny: TinyConfig = Field(default_factory=TinyConfig)


class AdapterConfig(Section):
    """How the backbone is tuned."""

    kind: Literal["lora", "full", "frozen"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.05
    targets: Literal["all-linear"] | list[str] = "all-linear"


class GateConfig(Section):
    """The two gate levels; ``mean`` replaces a level by the mean over the valid (ablation)."""

    modality: Literal["learned", "mean"] = "learned"
    expert: Literal["learned", "mean"] = "learned"
    temperature: PositiveFloat = 1.0
    balance_weight: float = Field(0.0, ge=0.0)
    usage_decay: Fraction = 0.9
    kernel: Literal["auto", "triton", "reference"] = Field(
        "auto",
        description="Kernel of the gate's mix; auto: Triton on CUDA where it can run, else the reference.",
        json_schema_extra=EXECUTION,
    )


def _known_expert(name: str, info: ValidationInfo) -> str:
    """Refuse unknown experts where no plugin may register one: a config is read without importing any."""
    if name not in EXPERTS and not info.data.get("plugins"):
        expected = f"{', '.join(map(repr, EXPERTS[:-1]))} or {EXPERTS[-1]!r}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return name


class FusionConfig(Section):
    """Encoders, experts, gate and pseudo tokens."""

    width: PositiveInt = Field(256, description="D")
    pseudo_tokens: int = Field(4, ge=0, description="K; 0 switches fusion off")
    heads: PositiveInt = 4
    dropout: Fraction = 0.1
    plugins: list[str] = Field(
        default_factory=list,
        description="Python files (.py) or installed modules that register experts of your own; they run: only code you trust",
        json_schema_extra=EXECUTION,
    )
    experts: list[Annotated[str, AfterValidator(_known_expert)]] = Field(
        default_factory=lambda: list(EXPERTS), min_length=1, description="local, semantic, global, or one of a plugin"
    )
    modalities: list[Modality] = Field(default_factory=lambda: list(MODALITIES), min_length=1)
    standardise: bool = Field(
        True,
        description="Audio and video features are standardised by the statistics of their dataset (egmf prepare), where it has any.",
    )
    local_kernels: list[PositiveInt] = Field(default_factory=lambda: [3, 5, 7], min_length=1)
    local_pooling: Literal["max", "logsumexp"] = "max"
    global_stride: PositiveInt = 4
    global_layers: PositiveInt = 2
    expert_loss_weight: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the loss of each expert's own answers (by a linear head) and of the gate's trust in them; 0: no heads.",
    )
    compile: bool = Field(
        False,
        description="torch.compile for the fusion network; takes minutes at the start of a run.",
        json_schema_extra=EXECUTION,
    )
    gate: GateConfig = Field(default_factory=GateConfig)

    @field_validator("plugins")
    @classmethod
    def _absolute(cls, value: list[str]) -> list[str]:
        # a run keeps its config: a plugin's file must be found from anywhere
        return [str(Path(name).expanduser().resolve()) if name.endswith(".py") else name for name in value]

    @property
    def ordered_experts(self) -> tuple[str, ...]:
        """The experts in the order of their places in the gate: those built in first, then the others as listed."""
        own = [name for name in self.experts if name not in EXPERTS]
        return (*(name for name in EXPERTS if name in self.experts), *own)

    @model_validator(mode="after")
    def _shape(self) -> FusionConfig:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if any(k % 2 == 0 for k in self.local_kernels):
            raise ValueError(f"local_kernels={self.local_kernels} must be odd")
        for name in ("experts", "modalities"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names one twice: {getattr(self, name)}")
        return self


class ModelConfig(Section):
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    fusion: FusionConfig = Field(default_factory=FusionConfig)

    @model_validator(mode="after")
    def _tuning(self) -> ModelConfig:
        if self.adapter.kind == "full" and self.backbone.quantization != "none":
            raise ValueError("adapter.kind=full cannot train a quantised backbone: use quantization=none, or lora")
        if self.adapter.kind == "frozen" and self.fusion.pseudo_tokens == 0:
            raise ValueError("nothing to train: adapter.kind=frozen with fusion.pseudo_tokens=0")
        return self


class LearningRates(Section):
    fusion: PositiveFloat = 1e-3
    backbone: PositiveFloat = Field(
        2e-4, description="Learning rate of LoRA, or of the whole backbone with adapter.kind=full."
    )


class TrainConfig(Section):
    """Optimisation; the global batch is a number of samples, the same on any number of ranks."""

    seed: int = Field(0, ge=0)
    epochs: PositiveFloat = Field(10.0, description="Passes over the training data.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; replaces epochs.")
    global_batch: PositiveInt = 32
    micro_tokens: PositiveInt = Field(
        2048,
        description="Positions that one rank passes through the backbone at once: limits memory, does not change results.",
        json_schema_extra=EXECUTION,
    )
    micro_batch: PositiveInt | None = Field(
        None,
        description="Samples that one rank trains at once, at most: limits memory further. Without it every rank gets an even part of a step.",
        json_schema_extra=EXECUTION,
    )
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero: Literal[0, 1, 2, 3] = Field(2, description="Stage of ZeRO; one GPU alone trains at 0 where it is 1 or 2.")
    offload: Literal["none", "cpu"] = Field("none", description="Where ZeRO keeps the optimizer's states.")
    lr: LearningRates = Field(default_factory=LearningRates)
    weight_decay: float = Field(0.01, ge=0.0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="Warm-up, as a share of the steps.")
    class_weights: Literal["none", "inverse", "effective"] = Field(
        "none",
        description="Weights of samples in the loss, by the size n of their class in the training data: 1 / n, or (1 - beta) / (1 - beta^n).",
    )
    class_weight_beta: Fraction = Field(0.999, description="beta of class_weights=effective.")
    label_smoothing: Fraction = Field(
        0.0,
        description="Share of an answer token's target that is spread over all tokens that continue some answer of the task.",
    )
    loss: Literal["full", "constrained"] = Field(
        "full",
        description="Over what the probability of an answer's token is taken: full: the vocabulary; constrained: the tokens that continue, or end, "
        "some answer of the task, so that nothing else is trained.",
    )
    regression_loss: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the expected absolute error over the number grid in a regression task's loss; "
        "each sample then carries all answers.",
    )
    clip: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0: no clipping.")
    log_every: PositiveInt = Field(10, json_schema_extra=EXECUTION)
    profile: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="First and last step that rank 0 profiles: a trace and a table in the run folder and MLflow.",
        json_schema_extra=EXECUTION,
    )
    deterministic: bool = Field(
        False,
        description="The same bits in every run on the same GPUs, and after a continuation; slower there. On CPUs it is so anyhow.",
        json_schema_extra=EXECUTION,
    )
    eval_every: int | None = Field(
        None, ge=1, description="Steps between validations; default: once an epoch.", json_schema_extra=SELECTION
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints; default: at each validation.", json_schema_extra=EXECUTION
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints kept, beside the best.", json_schema_extra=EXECUTION)
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: continue the run folder's last checkpoint; never: move what is there to before-TIME and start anew.",
        json_schema_extra=EXECUTION,
    )
    stop_signals: list[StopSignal] = Field(
        default_factory=lambda: list(STOP_SIGNALS),
        min_length=1,
        description="Signals that, sent to any rank, stop all ranks with a checkpoint; leave SIGUSR1 out where NCCL uses it.",
        json_schema_extra=EXECUTION,
    )
    probe: bool | Literal["always"] = Field(
        True,
        description="Try the largest batches of the data before the first step; always: also where the run folder says that they passed.",
        json_schema_extra=EXECUTION,
    )
    rendezvous_seconds: PositiveFloat = Field(
        300.0, description="Seconds each rank waits for the others at start-up.", json_schema_extra=EXECUTION
    )
    max_skipped: PositiveInt = Field(
        5,
        description="Steps in a row with a non-finite loss or gradient, after which the run stops.",
        json_schema_extra=SELECTION,
    )
    spike: PositiveFloat = Field(
        8.0,
        description="A loss so many robust standard deviations above the recent median is marked as a spike.",
        json_schema_extra=EXECUTION,
    )
    stuck_seconds: float = Field(
        600.0,
        ge=0.0,
        description="Seconds without progress on any rank, after which the run ends with every rank's stacks; 0: never.",
        json_schema_extra=EXECUTION,
    )

    @field_validator("profile")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"the first step is after the last: {list(steps)}")
        return steps


Split = Literal["train", "valid", "test"]


def _default_splits() -> list[Split]:
    return ["valid", "test"]


class EvalConfig(Section):
    mode: Literal["score", "generate"] = Field(
        "score", description="score: score every possible answer; generate: generate text and parse it."
    )
    score: Literal["constrained", "full"] = Field(
        "constrained",
        description="Over what the probability of an answer's token is taken in scores: constrained: the tokens that continue, or end, some answer "
        "of the task; full: the vocabulary, which costs a pass through the whole head.",
    )
    generation: Literal["free", "constrained"] = Field(
        "free",
        description="Text that mode=generate may write: free: any; constrained: the task's answers alone, so that none is invalid.",
    )
    prediction: Literal["expectation", "mode"] = Field(
        "expectation",
        description="Prediction from a regression task's number grid: its expectation, or its most probable value.",
    )
    tokens: PositiveInt = Field(
        8192, description="Positions that one rank scores at once: limits memory.", json_schema_extra=EXECUTION
    )
    batch: PositiveInt | None = Field(
        None, description="Samples that one rank scores at once, at most.", json_schema_extra=EXECUTION
    )
    splits: list[Split] = Field(default_factory=_default_splits)
    select: str | dict[str, str] = Field(
        default_factory=dict,
        description="Metric that chooses the checkpoint: of every task, or task -> metric; default: the task's own.",
        json_schema_extra=SELECTION,
    )

    @field_validator("select", mode="before")
    @classmethod
    def _metric_names(cls, value: object) -> object:
        value = {} if value is None else value
        names = list(value.values()) if isinstance(value, dict) else [value]
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"must be a metric's name, or task -> metric such as {{meld: uar}}, not {value!r}")
        return value


class TrackConfig(Section):
    mlflow: bool = True
    uri: str | None = Field(
        None,
        description="MLflow server or store; default: MLFLOW_TRACKING_URI, else the SQLite file mlflow.db beside the run folder.",
    )
    experiment: str = "egmf"
    run_name: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    system_metrics: bool = True
    report: bool = Field(True, description="Write report.html and its pictures when the run ends.")
    flush_seconds: float = Field(30.0, ge=0.0, description="Maximum seconds to wait for MLflow when a run ends.")


class RunConfig(Section):
    """One run: one training with one seed."""

    task: str | list[str] = Field(
        description="A built-in task, a YAML file that defines one or several questions, or a list of these."
    )
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig, json_schema_extra=SCORING)
    track: TrackConfig = Field(default_factory=TrackConfig, json_schema_extra=RECORD)
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Raw DeepSpeed keys; they override the derived ones."
    )

    @field_validator("task")
    @classmethod
    def _tasks(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not names or any(not n for n in names):
            raise ValueError("name at least one task")
        if len(set(names)) < len(names):
            raise ValueError(f"names a task twice: {names}")
        # a run keeps its config: a task's own file must be found from anywhere
        whole = [str(Path(n).resolve()) if n.endswith((".yaml", ".yml")) else n for n in names]
        return whole[0] if isinstance(value, str) else whole

    @model_validator(mode="after")
    def _generated_as_trained(self) -> RunConfig:
        if self.train.loss == "constrained" and self.eval.mode == "generate" and self.eval.generation == "free":
            raise ValueError(
                "eval.mode=generate writes free text, and train.loss=constrained trains no token but where answers differ: set "
                "eval.generation=constrained, or train.loss=full"
            )
        return self

    @property
    def tasks(self) -> list[str]:
        """The tasks of this run, always as a list."""
        return [self.task] if isinstance(self.task, str) else list(self.task)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, what it extends, and `overrides` (``dotted.key=value``) into one checked config.

    `path` is a file, or the name of a shipped config.

    Raises:
        ConfigError: with every fault of the files and overrides, each with its dotted key.
    """
    over = parse_overrides(overrides, is_text_setting)
    return check_config(merge(read_layers(locate(path)), over, str(path)), where=str(path))


def is_text_setting(key: str) -> bool:
    """Whether the value of a dotted key is text, so that an override of it is not read as YAML."""
    return is_text(RunConfig, key)


def check_config(raw: Any, where: str = "config") -> RunConfig:
    """Validate a plain dictionary; see :func:`load_config`."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        faults = [describe(fault, RunConfig) for fault in error.errors()]
        head = f"{where}: {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n".join([head, *(f"  {fault}" for fault in faults)])) from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML that :func:`load_config` reads back to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, for tracking and comparison; lists and empty sections stay values."""
    return dotted(config.model_dump(mode="json"))
