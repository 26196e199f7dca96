"""The backbone: a causal language model of any family, read as embeddings -> hidden states -> logits.

Shapes: B rows, L positions, H hidden size, V vocabulary. The three steps are separate so that hidden states can be
gathered before the output head: no `[B, L, V]` tensor exists. Each step calls a module's forward, never a weight, so
that ZeRO-3 can gather parameters; what needs whole weights is measured while they load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.adapter import adapt
from trainer.models.fingerprint import fingerprint, measure
from trainer.models.loading import BackboneError, load_model, load_tokenizer, resolve_attention
from trainer.models.sharded import gathered_by_layer
from trainer.models.tiny import build_tiny

__all__ = ["Backbone", "BackboneError", "base_fingerprint", "build_backbone", "build_tiny", "load_tokenizer"]

SDPA_FLOAT32 = "sdpa_float32"


class Backbone(nn.Module):
    """A causal language model with its adapter.

    Attributes: `model` (the language model, inside peft's wrapper with LoRA), `tokenizer`, `attention` (the kernel in
    use), `vocabulary` (V), `hidden_size`, `embedding_norm` (mean L2 norm of an input embedding), `fingerprint` (of the frozen weights).
    """

    embedding_norm: float
    fingerprint: str

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, attention: str) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.attention = attention
        embedding: Any = self.base.get_input_embeddings()
        self.vocabulary, self.hidden_size = int(embedding.num_embeddings), int(embedding.embedding_dim)
        self._scale_logits = _logit_scale(self.base.config)

    @property
    def base(self) -> PreTrainedModel:
        """The language model itself, inside peft's wrapper or not."""
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings `[..., H]` of token ids `[...]`."""
        return self.base.get_input_embeddings()(ids)

    def hidden(
        self, embeds_BLH: Tensor, positions_BL: Tensor, mask_B1LL: Tensor | None = None, *, exact: bool = False
    ) -> Tensor:
        """Hidden states `[B, L, H]` after the final norm.

        Without a mask attention is causal, which is all that rows padded on the right need. `mask_B1LL[b, 0, q, k]`
        true: q sees k. Kernels that take no such mask (flash-attn) leave this one pass to sdpa. `exact` with a mask: half
        precision attends in float32, so that a row's values do not hang on its padding and neighbours.
        """
        decoder = self.base.get_decoder()
        if mask_B1LL is None:
            out = decoder(inputs_embeds=embeds_BLH, position_ids=positions_BL, attention_mask=None, use_cache=False)
            return out.last_hidden_state
        with self._masked_kernel(exact and embeds_BLH.dtype in (torch.bfloat16, torch.float16)) as kernel:
            mask = self._layer_masks(mask_B1LL, positions_BL, embeds_BLH.dtype if kernel == "eager" else None)
            out = decoder(inputs_embeds=embeds_BLH, position_ids=positions_BL, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    def step(self, embeds_BLH: Tensor, positions_BL: Tensor, seen_BS: Tensor, cache: DynamicCache) -> Tensor:
        """Hidden states `[B, L, H]` of positions that continue those in `cache`, which grows by them.

        `seen_BS` covers the cache and the new positions: false on padding.
        """
        out = self.base.get_decoder()(
            inputs_embeds=embeds_BLH,
            position_ids=positions_BL,
            attention_mask=seen_BS.long(),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.base.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., H]`."""
        logits = self.base.get_output_embeddings()(hidden)
        return logits if self._scale_logits is None else self._scale_logits(logits)

    def _layer_masks(
        self, mask_B1LL: Tensor, positions_BL: Tensor, additive: torch.dtype | None
    ) -> Tensor | dict[str, Tensor]:
        """The mask as the decoder takes it: narrowed to the window of layers that have one, added to scores if asked."""
        config = self.base.config
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
        masks = {"full_attention": mask_B1LL}
        if window and "sliding_attention" in kinds:
            near_B1LL = (positions_BL[:, None, :, None] - positions_BL[:, None, None, :]) < window
            masks["sliding_attention"] = mask_B1LL & near_B1LL
        if additive is not None:
            zero, lowest = torch.tensor(0.0, dtype=additive), torch.finfo(additive).min
            masks = {kind: torch.where(mask, zero.to(mask.device), lowest) for kind, mask in masks.items()}
        if getattr(config, "layer_types", None) and len(masks) > 1:
            return masks
        return masks[kinds.pop() if len(masks) > 1 else "full_attention"]

    @contextmanager
    def _masked_kernel(self, exact: bool) -> Iterator[str]:
        plain = "sdpa" if getattr(self.base, "_supports_sdpa", True) else "eager"
        kernel = self.attention if self.attention in ("sdpa", "eager") else plain
        if exact and kernel == "sdpa":  # eager takes its softmax in float32 as it is
            kernel = SDPA_FLOAT32
        if kernel == self.attention:
            yield kernel
            return
        if torch.is_grad_enabled() and self.training and getattr(self.base, "is_gradient_checkpointing", False):
            raise ValueError(
                f"this pass attends with {kernel}, and gradient checkpointing would recompute it with {self.attention}: "
                "use model.backbone.attention=sdpa, or no checkpointing"
            )
        configs = {id(m.config): m.config for m in self.base.modules() if isinstance(m, PreTrainedModel)}.values()
        before = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = kernel
            yield kernel
        finally:
            for config, own in zip(configs, before, strict=True):
                config._attn_implementation = own

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As in `nn.Module`, without the scales of 4-bit weights: like the frozen weights themselves they are read from
        the source of the backbone, and DeepSpeed would put them into every rank's checkpoint."""
        state = super().state_dict(*arguments, **options)
        layers = {name for name, module in self.named_modules() if isinstance(module, Linear4bit)}
        prefix = options.get("prefix", "")
        for key in list(state):
            layer, scale, _ = key.removeprefix(prefix).partition(".weight.")
            if scale and layer in layers:
                del state[key]
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """As in `nn.Module`, but a cast (DeepSpeed's to bf16) leaves float buffers alone: rotary frequencies need float32."""
        return keep_buffers(self, lambda: super(Backbone, self)._apply(fn, recurse))


def keep_buffers(module: nn.Module, change: Callable[[], Any]) -> Any:
    """Run `change`, which may cast and move `module`; give buffers of floats their former precision back."""
    before = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    out = change()
    for name, old in before.items():
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)._buffers
        now = place[leaf]
        if now is not None and now.dtype != old.dtype:
            place[leaf] = old.to(now.device)
    return out


def build_backbone(
    config: BackboneConfig,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    folder: Path | None = None,
    zero3: dict[str, Any] | None = None,
) -> Backbone:
    """Load, quantise, adapt and check a backbone; `folder` holds the tiny one (name 'tiny').

    With `zero3`, DeepSpeed's JSON, each rank keeps its part of every pretrained weight: called by all ranks together.

    At the end four tokens go through it twice, whole and as a tree, and must agree: a family whose logits are made in a way
    that is not reproduced here, or whose layers cannot attend to a tree, is refused by name.

    Raises:
        ValueError: with what is wrong and what to do.
    """
    device = torch.device(device)
    AttentionInterface.register(SDPA_FLOAT32, _sdpa_float32)
    AttentionMaskInterface.register(SDPA_FLOAT32, sdpa_mask)
    attention = resolve_attention(config.attention, device, dtype)
    tokenizer = load_tokenizer(config, folder)
    loaded = load_model(config, dtype, device, attention, folder, zero3)
    model = loaded.model
    attention = attention or str(model.config._attn_implementation)
    backbone = Backbone(adapt(model, adapter, dtype), tokenizer, attention).to(device)
    if len(tokenizer) > backbone.vocabulary:
        raise BackboneError(
            f"{config.name}: its tokenizer has {len(tokenizer)} tokens, the model only {backbone.vocabulary}"
        )
    backbone.embedding_norm = loaded.embedding_norm(len(tokenizer))
    backbone.fingerprint = fingerprint((name, loaded.measured[name]) for name in _frozen(backbone))
    if dist.is_initialized() and dist.get_world_size() > 1:
        _check_same_base(config.name, backbone.fingerprint)
    if config.gradient_checkpointing:
        enable = getattr(backbone.base, "activation_checkpointing_enable", backbone.base.gradient_checkpointing_enable)
        enable({"use_reentrant": config.reentrant})
        if config.reentrant:  # the reentrant way asks for a gradient of its input, or gives the layers none
            backbone.base.enable_input_require_grads()
    with gathered_by_layer(backbone):
        _probe(backbone, config.name)
    backbone.train()
    return backbone


def _sdpa_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), None


def base_fingerprint(backbone: Backbone) -> str:
    """sha256 over all frozen weights as they are stored: names, dtypes, shapes, bytes; of 4-bit weights the packed bytes
    and their scales too. Any changed bit changes it.

    It is the same with and without LoRA, and differs between dtypes, and may between CPU and CUDA (rounding of 4-bit
    weights). Weights must be whole: of those that ZeRO-3 cut up the loader made it (`Backbone.fingerprint`). About 1 s
    per GB and core, tensors in parallel.
    """
    frozen = _frozen(backbone)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        measured = pool.map(measure, frozen.values())
    return fingerprint(zip(frozen, measured, strict=True))


def _frozen(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The weights that are not trained, by the names they have without LoRA."""
    named = backbone.base.named_parameters()
    return {n.replace(".base_layer.", "."): p for n, p in named if not p.requires_grad and "lora_" not in n}


def _check_same_base(name: str, ours: str) -> None:
    """Every rank must have read the same weights.

    Raises:
        BackboneError: some read others, with the ranks.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    other = [str(rank) for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if other:
        raise BackboneError(
            f"{name}: rank {', '.join(other)} read other weights than rank 0: the files differ between nodes, or changed "
            "while they were read. Bring the same to all, or use model.backbone.read=rank0"
        )


def _logit_scale(config: Any) -> Callable[[Tensor], Tensor] | None:
    cap, times, over = (getattr(config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    if times and times != 1:
        return lambda logits: logits * times
    if over and over != 1:
        return lambda logits: logits / over
    return None


@torch.no_grad()
def _probe(backbone: Backbone, name: str) -> None:
    """Logits of four tokens: the model's own against ours, the last two tokens as branches of a tree."""
    first, rows = next(backbone.parameters()), backbone.vocabulary
    device = first.device
    ids = torch.tensor([rows // 7, rows // 5, rows // 3, rows // 2], device=device)
    kind, was_training = backbone.base.config.model_type, backbone.training
    backbone.eval()
    try:
        branches = torch.stack([ids[[0, 1, 2]], ids[[0, 1, 3]]])
        want = backbone.base(input_ids=branches, use_cache=False).logits.float()
        see = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool, device=device)
        positions = torch.tensor([[0, 1, 2, 2]], device=device)
        got = backbone.logits(backbone.hidden(backbone.embed(ids[None]), positions, see[None, None]))[0].float()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BackboneError(f"{name}: models of type {kind!r} are not supported: {error}") from error
    finally:
        backbone.train(was_training)
    want = torch.stack([want[0, 0], want[0, 1], want[0, 2], want[1, 2]])
    off = float((got - want).norm() / want.norm().clamp_min(1e-6))
    if not off < (1e-3 if first.dtype == torch.float32 else 0.1):
        raise BackboneError(
            f"{name}: models of type {kind!r} are not supported: logits differ from the model's own by {off:.2g} "
            "(relative). Its head or its layers do something that is not reproduced here"
        )
