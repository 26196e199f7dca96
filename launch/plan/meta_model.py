"""The model of a run without its weights: shapes only, built in seconds on any machine, counted and passed through.

Everything here happens on PyTorch's fake tensors (meta tensors that remember a device), so that a 72B model costs no
memory. What a pass holds is not estimated from formulas but recorded from the run's own code, operation by operation.

Shapes: B samples of a micro-batch, L positions of a padded row, P prefix tokens, T own tokens of a packed row, K pseudo
tokens, A answer tokens, n answer tokens of all samples, S text tokens.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.batch import Batch, Features, FusionInput, PackedBatch, Packing
from trainer.config import RunConfig
from trainer.models.backbone.causal_lm import adapted_backbone
from trainer.models.backbone.packed import MASKED, install
from trainer.models.backbone.quantization import BLOCK
from trainer.models.build import build_model
from trainer.models.egmf import EGMF, LossOutput
from trainer.models.optimizer_groups import parameter_groups

SAMPLE_LAYERS = (2, 4)  # passes are recorded with so many layers; what a layer adds is their difference
NESTED_BLOCK = 256  # scales that share one scale, with double quantisation


@dataclass(frozen=True)
class Rows:
    """A micro-batch of one task, in sizes.

    `own` are the positions of every sample beside the `prefix`, `answer` the target tokens taken for each (end token
    included), `groups` the calls of the fusion network: samples, and their longest text, audio and video.
    """

    task: str
    packed: bool
    prefix: int
    own: tuple[int, ...]
    answer: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Positions that a token may attend to."""
        return self.prefix + max(self.own)

    @property
    def positions(self) -> int:
        """Through the backbone, padding included."""
        return self.prefix + sum(self.own) if self.packed else len(self.own) * self.longest

    @property
    def read(self) -> int:
        """Tokens and frames that the fusion network reads, padding included."""
        return sum(samples * sum(longest) for samples, *longest in self.groups)

    def to_json(self) -> dict[str, Any]:
        text, audio, video = (max(group[i] for group in self.groups) for i in (1, 2, 3))
        return {
            "task": self.task,
            "layout": "packed" if self.packed else "padded",
            "samples": len(self.own),
            "positions": self.positions,
            "longest": self.longest,
            "text_tokens": text,
            "audio_frames": audio,
            "video_frames": video,
        }


@dataclass(frozen=True)
class Weights:
    """What a model consists of. Elements are numbers of weights, bytes as they are stored.

    `largest_layer` is the dtype's bytes of the largest decoder layer as ZeRO-3 gathers it (4-bit: packed).
    """

    trainable: int  # elements
    trainable_parts: dict[str, int]  # elements of fusion, of LoRA or of the backbone
    groups: list[int]  # elements of each of the optimizer's groups
    largest_trainable: int  # elements
    frozen: int  # elements, 4-bit ones included
    dense_bytes: int  # frozen, not quantised
    four_bit: int  # elements
    packed_bytes: int
    scale_bytes: int  # absmax and what goes with it
    gathered_bytes: int  # frozen and trainable: what ZeRO-3 cuts up
    gathered_elements: int  # as DeepSpeed counts them: a packed byte is one
    persistent_bytes: int  # below DeepSpeed's threshold, whole on every rank
    largest_module_bytes: int
    buffer_bytes: int


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro-batch.

    Bytes beyond weights and inputs: `peak` without gradients of weights, `peak_with_gradients` with all that are there at
    the time. `flops`: multiplications and additions of matrix products, recomputation included.
    """

    peak: int
    peak_with_gradients: int
    flops: int


@contextlib.contextmanager
def abstract() -> Iterator[None]:
    """Inside the block tensors have shapes and no contents."""
    noisy = [logging.getLogger(name) for name in ("trainer.models.fusion.network", "bitsandbytes")]
    levels = [log.level for log in noisy]
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in noisy:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(noisy, levels, strict=True):
                log.setLevel(level)


def build(
    config: RunConfig,
    shape: PretrainedConfig,
    widths: Mapping[str, Mapping[str, int]],
    dtype: torch.dtype,
    *,
    answers: Mapping[str, int] | None = None,
    layers: int | None = None,
    checkpointing: bool = False,
) -> EGMF:
    """The run's model inside :func:`abstract`.

    Args:
        shape: the backbone's configuration.
        widths: task -> features per frame of audio and video.
        answers: task -> number of its answers; needed where the config asks for expert heads.
        layers: of the backbone; default all.
    """
    shape = copy.deepcopy(shape) if layers is None else _cut(shape, layers)
    changes = {"gradient_checkpointing": checkpointing, "reentrant": False}
    backbone_config = config.model.backbone.model_copy(update=changes)
    with unset_fake_temporarily(), torch.device("meta"):  # modules are made here: libraries know meta tensors
        eager = {"attn_implementation": "eager"} if backbone_config.attention == "eager" else {}
        base = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, trust_remote_code=backbone_config.trust_remote_code, **eager
        )
        attention = _attention(base, backbone_config.attention)
        if backbone_config.quantization == "nf4":
            _quantise(base, dtype, backbone_config.double_quantization)
        tokenizer: Any = SimpleNamespace(eos_token_id=0, name_or_path=backbone_config.name)
        backbone = adapted_backbone(base, tokenizer, attention, backbone_config, config.model.adapter, dtype)
        backbone.embedding_norm = 1.0
        model = build_model(config.model.fusion, backbone, widths, answers, dtype, torch.device("meta"))
    _fake(model)
    model.train()
    return model


def _attention(base: PreTrainedModel, asked: str) -> str:
    """The attention backend that is recorded: as asked the mask of a whole row, else blocks, which hold the most of what `auto`
    may choose on a GPU, where the family can."""
    own = str(base.config._attn_implementation)
    if own == "sdpa" and base._supports_attention_backend:
        install(base)
        return asked if asked in MASKED else "blocks"
    return own


def _fake(model: nn.Module) -> None:
    """Give every meta tensor of a model a fake one on the CPU instead; a weight shared by two modules stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            new: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                for part in (state, state.state2):
                    for key, value in vars(part).items() if part is not None else ():
                        if isinstance(value, Tensor):
                            setattr(part, key, torch.empty(value.shape, dtype=value.dtype))
                new.quant_state = state
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None:
                    place[name] = fake(tensor)


def weigh(model: EGMF, persistence: int) -> Weights:
    """Count a whole model; `persistence` is ZeRO-3's threshold in elements."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    packed = [p for p in frozen if hasattr(p, "quant_state")]
    dense_bytes = sum(map(_bytes, frozen)) - sum(map(_bytes, packed))
    parts: dict[str, int] = {}
    for name, p in trainable:
        part = "fusion" if name.startswith("fusion.") else "LoRA" if "lora_" in name else "backbone"
        parts[part] = parts.get(part, 0) + p.numel()
    groups = parameter_groups(model, 1.0, 1.0, 0.0)
    every = list(model.parameters())
    return Weights(
        trainable=sum(p.numel() for _, p in trainable),
        trainable_parts=parts,
        groups=[sum(p.numel() for p in group["params"]) for group in groups],
        largest_trainable=max((p.numel() for _, p in trainable), default=0),
        frozen=sum(_elements(p) for p in frozen),
        dense_bytes=dense_bytes,
        four_bit=sum(_elements(p) for p in packed),
        packed_bytes=sum(map(_bytes, packed)),
        scale_bytes=sum(_scale_bytes(p) for p in packed),
        gathered_bytes=sum(map(_bytes, every)),
        gathered_elements=sum(p.numel() for p in every),
        persistent_bytes=sum(_bytes(p) for p in every if p.numel() <= persistence),
        largest_module_bytes=max(sum(map(_bytes, m.parameters(recurse=False))) for m in model.modules()),
        buffer_bytes=sum(map(_bytes, model.buffers())),
    )


def record_pass(model: EGMF, rows: Rows, dtype: torch.dtype) -> Pass:
    """Pass a micro-batch through the model, forward and backward, inside :func:`abstract`."""
    batch = _packed(model, rows, dtype) if rows.packed else _padded(model, rows, dtype)
    watch, held = _Watch(), [0]

    def take(p: Tensor) -> None:
        assert p.grad is not None
        held[0] += _bytes(p.grad)
        p.grad = None
        watch.gradients = held[0]

    hooks = [p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad]
    with watch:
        output = model(batch)
        assert isinstance(output, LossOutput)
        (output.loss_B.sum() + output.auxiliary_B.sum() + output.unused_param_zero).backward()
    for hook in hooks:
        hook.remove()
    return Pass(watch.peak, watch.peak_with_gradients, watch.flops)


def grow(small: Pass, large: Pass, layers: int) -> Pass:
    """The pass of a model of `layers` layers from those with the two of `SAMPLE_LAYERS`: linear in their number."""
    few, many = SAMPLE_LAYERS

    def line(a: int, b: int) -> int:
        return round(b + (b - a) / (many - few) * (layers - many))

    return Pass(
        line(small.peak, large.peak),
        line(small.peak_with_gradients, large.peak_with_gradients),
        line(small.flops, large.flops),
    )


class _Watch(TorchDispatchMode):
    """Bytes of the storages that come to life under it, their peak, and the floating-point operations.

    `gradients` is counted on top in the second peak. torch's own FlopCounterMode would keep activations alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_with_gradients = self.flops = 0
        self._seen: dict[int, Any] = {}
        self._formulas = {**flop_registry, **_formulas()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if func._overloadpacket in self._formulas:
            self.flops += self._formulas[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in self._seen and id(storage) not in given:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _packed(model: EGMF, rows: Rows, dtype: torch.dtype) -> PackedBatch:
    """A packed batch of these sizes; what its tokens and features are does not matter."""
    B, K, A = len(rows.own), _pseudo_tokens(model), rows.answer
    end_B = torch.tensor(rows.own).cumsum(0)
    start_B = end_B - torch.tensor(rows.own)
    answer_at_BA = (end_B[:, None] - A + torch.arange(A)).clamp(min=0)
    return PackedBatch(
        task=rows.task,
        ids=[""] * B,
        prefix_ids_P=_ids(rows.prefix),
        own_ids_T=_ids(sum(rows.own)),
        place_BK=start_B[:, None] + torch.arange(K),
        cue_at_B=answer_at_BA[:, 0],
        packing=Packing(rows.prefix, torch.tensor(rows.own), sum(rows.own), max(rows.own)),
        answer_at_n=answer_at_BA.flatten(),
        answer_id_n=_ids(B * A),
        answer_slot_n=torch.arange(B * A),
        longest_answer=A,
        inputs=_inputs(model, rows, dtype),
        target_B=torch.zeros(B),
        weight_B=torch.ones(B),
        answer_B=torch.zeros(B, dtype=torch.long),
    )


def _padded(model: EGMF, rows: Rows, dtype: torch.dtype) -> Batch:
    """The same of a padded batch."""
    B, L, A = len(rows.own), rows.longest, rows.answer
    (read,) = _inputs(model, rows, dtype)
    return Batch(
        task=rows.task,
        ids=[""] * B,
        input_ids_BL=_ids(B, L),
        context_length_B=torch.full((B,), L - A + 1),
        pseudo_start=rows.prefix,
        pseudo_tokens=_pseudo_tokens(model),
        answer_ids_BA=_ids(B, A),
        answer_mask_BA=torch.ones(B, A, dtype=torch.bool),
        text_ids_BS=read.text_ids_BS,
        text_mask_BS=read.text_mask_BS,
        audio=read.audio,
        video=read.video,
        target_B=torch.zeros(B),
        weight_B=torch.ones(B),
        answer_B=torch.zeros(B, dtype=torch.long),
    )


def _inputs(model: EGMF, rows: Rows, dtype: torch.dtype) -> list[FusionInput]:
    encoded = {} if model.fusion is None else model.fusion.encoders.inputs[rows.task]
    widths = {str(name): width for name, width in encoded.items()}

    def features(name: str, samples: int, frames: int) -> Features:
        size = (samples, max(1, frames))
        values = torch.zeros(*size, max(1, widths.get(name, 0)), dtype=dtype)
        return Features(values, torch.ones(size, dtype=torch.bool), torch.zeros(size))

    return [
        FusionInput(
            _ids(n, max(1, text)),
            torch.ones(n, max(1, text), dtype=torch.bool),
            features("audio", n, audio),
            features("video", n, video),
        )
        for n, text, audio, video in rows.groups
    ]


def _pseudo_tokens(model: EGMF) -> int:
    return 0 if model.fusion is None else int(model.fusion.gate.slot_KD.shape[0])


def _ids(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long)


def _cut(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = layers
    kinds = getattr(shape, "layer_types", None)
    if kinds:
        shape.layer_types = list(kinds)[:layers]
    return shape


def _quantise(model: nn.Module, dtype: torch.dtype, double: bool) -> None:
    """Put bitsandbytes' layers, as they are after loading, in the place of all linear layers but the head."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        blocks = -(-layer.weight.numel() // BLOCK)
        outer = None
        if double:
            outer = QuantState(
                torch.empty(-(-blocks // NESTED_BLOCK)),
                blocksize=NESTED_BLOCK,
                code=torch.empty(256),
                dtype=torch.float32,
            )
        state = QuantState(
            torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
            shape=layer.weight.shape,
            code=torch.empty(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()) if double else None,
            state2=outer,
        )
        new = Linear4bit(layer.in_features, layer.out_features, False, dtype, double, "nf4", torch.uint8)
        packed = torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        new.weight = Params4bit(
            packed, quant_state=state, compress_statistics=double, quant_type="nf4", bnb_quantized=True, module=new
        )
        new.bias, new.quant_state, new.support_avx512bf16_for_cpu = layer.bias, state, False
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _attention_flops(query: Any, key: Any, _value: Any, _dropout: float = 0, causal: bool = False, **_: Any) -> int:
    """Scores and weighted sums; of a causal row half of the square."""
    B, h, L, d = query
    whole = 2 * 2 * B * h * L * key[2] * d
    return whole // 2 if causal else whole


def _attention_backward_flops(
    _grad: Any, query: Any, key: Any, value: Any, _out: Any, _norm: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return _attention_flops(query, key, value, dropout, causal) * 5 // 2


def _gemm_4bit_flops(rows: Any, _packed: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows) * weight[0]


def _formulas() -> dict[Any, Any]:
    import bitsandbytes  # noqa: F401  # registers its operations

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
        torch.ops.bitsandbytes.gemm_4bit: shape_wrapper(_gemm_4bit_flops),
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _elements(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _scale_bytes(parameter: Any) -> int:
    state = parameter.quant_state
    parts = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        parts += [state.state2.absmax, state.state2.code]
    return sum(_bytes(part) for part in parts if part is not None)
