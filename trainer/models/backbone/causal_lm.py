"""The backbone: a causal language model of any family, read as embeddings -> hidden states -> logits.

Shapes: B rows, L positions, H hidden size, V vocabulary. The three steps are separate so that hidden states can be
gathered before the output head: no `[B, L, V]` tensor exists. Each step calls a module's forward, never a weight, so
that ZeRO-3 can gather parameters; what needs whole weights is measured while they load.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from trainer.batch import Packing
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.adapter import adapt
from trainer.models.backbone.attention import choose_attention
from trainer.models.backbone.checkpointing import is_checkpointing, set_checkpointing
from trainer.models.backbone.fingerprint import BaseFingerprint, fingerprint, measure, source_fingerprint
from trainer.models.backbone.limits import RowLimits, row_limits
from trainer.models.backbone.loading import BackboneError, load_model, load_tokenizer, resolve_attention
from trainer.models.backbone.packed import (
    CAUSAL_ONLY,
    HALF,
    MASKED,
    NAME,
    Kernel,
    PackedRow,
    PrefixCache,
    causal,
    causal_flash,
    placeholder,
)
from trainer.models.backbone.sharded import gathered_by_layer, is_partitioned
from trainer.models.backbone.tiny import build_tiny
from trainer.models.ranks import Ranks, SingleProcess

__all__ = ["Backbone", "BackboneError", "base_fingerprint", "build_backbone", "build_tiny", "load_tokenizer"]

log = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A causal language model with its adapter.

    Attributes: `model` (the language model, inside peft's wrapper with LoRA), `tokenizer`, `attention` (the kernel in
    use), `vocabulary` (V), `hidden_size`, `embedding_norm` (mean L2 norm of an input embedding), `fingerprint` (of the frozen weights as read),
    `fingerprints` (the same, and the one of an earlier version),
    `limits` (how long rows may be), `scored_logits` (entries of logits that scoring may hold at a time, where that is more than usual).
    """

    embedding_norm: float
    fingerprints: BaseFingerprint

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, attention: str) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.attention = attention
        embedding: Any = self.base.get_input_embeddings()
        self.vocabulary, self.hidden_size = int(embedding.num_embeddings), int(embedding.embedding_dim)
        self._scale_logits = _logit_scale(self.base.config)
        self._logged: set[str] = set()
        self.limits = RowLimits()
        self.scored_logits = 0

    @property
    def base(self) -> PreTrainedModel:
        """The language model itself, inside peft's wrapper or not."""
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model

    @property
    def fingerprint(self) -> str:
        """Of the frozen weights as they were read: the same on every device, at every number of threads and of ranks."""
        return self.fingerprints.source

    @property
    def takes_kernels(self) -> bool:
        """Whether the layers attend through :func:`trainer.models.backbone.packed.attend`."""
        return bool(self.base.config._attn_implementation == NAME)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings `[..., H]` of token ids `[...]`."""
        return self.base.get_input_embeddings()(ids)

    def hidden(
        self, embeds_BLH: Tensor, positions_BL: Tensor, mask_B1LL: Tensor | None = None, *, fp32_attention: bool = False
    ) -> Tensor:
        """Hidden states `[B, L, H]` after the final norm.

        Without a mask attention is causal, which is all that rows padded on the right need. `mask_B1LL[b, 0, q, k]`
        true: q sees k; flash-attn takes no such mask, and leaves this pass to sdpa. `fp32_attention`: half precision attends in
        float32, so that a row's values do not hang on its padding and neighbours.

        Raises:
            ValueError: the rows are longer than :attr:`limits` allow.
        """
        self.limits.check_positions(embeds_BLH.shape[1])
        if mask_B1LL is not None:
            self.limits.check_places(embeds_BLH.shape[1], packed=False)
        kernel: Kernel | None = None
        mask: Tensor | dict[str, Tensor] | None = None
        if mask_B1LL is not None:
            mask = self._layer_masks(mask_B1LL, positions_BL, positions_BL, embeds_BLH.dtype)
        elif self.takes_kernels and self._within_window(embeds_BLH.shape[1]):
            flash = self.attention == "flash_attention_2" and not fp32_attention
            kernel = causal_flash if flash else causal
        return self._decode(embeds_BLH, positions_BL, mask, kernel, fp32_attention)

    def packed(
        self, embeds_TH: Tensor, packing: Packing, cache: PrefixCache | None = None, *, fp32_attention: bool = False
    ) -> Tensor:
        """Hidden states `[T, H]` of one packed row, after the final norm.

        T = prefix + total; with a `cache` of the prefix (from :meth:`prefix`, left as it is) T = total. `fp32_attention` as in
        :meth:`hidden`.

        Raises:
            ValueError: the row, the packing and the cache do not fit each other, or are longer than :attr:`limits` allow.
        """
        self.limits.check_positions(packing.prefix + packing.longest)
        self.limits.check_places(packing.prefix + packing.total, packed=True)
        if cache is not None and cache.length != packing.prefix:
            raise ValueError(f"the cache holds a prefix of {cache.length} tokens, the packing names {packing.prefix}")
        tokens = packing.total + (0 if cache is not None else packing.prefix)
        if embeds_TH.shape[0] != tokens:
            raise ValueError(f"the row has {embeds_TH.shape[0]} tokens, its packing names {tokens}")
        row = PackedRow(packing, cached=cache is not None)
        kernel = self._packed_kernel(row, fp32_attention, embeds_TH.dtype)
        mask: Tensor | dict[str, Tensor] | None = None
        positions_1T = row.positions_R[None]
        if kernel is None:
            keys_1K = row.key_positions_K[None]
            mask = self._layer_masks(row.mask_RK[None, None], positions_1T, keys_1K, embeds_TH.dtype)
        return self._decode(embeds_TH[None], positions_1T, mask, kernel, fp32_attention, cache)[0]

    @torch.no_grad()
    def prefix(self, embeds_PH: Tensor, *, fp32_attention: bool = False) -> PrefixCache:
        """Keys and values of a prefix, for :meth:`packed`: constants, without gradients."""
        length = embeds_PH.shape[0]
        self.limits.check_positions(length)
        cache = PrefixCache(length)
        if length:
            positions_1P = torch.arange(length, device=embeds_PH.device)[None]
            seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=embeds_PH.device).tril()
            mask = self._layer_masks(seen, positions_1P, positions_1P, embeds_PH.dtype)
            cache.fill(lambda: self._decode(embeds_PH[None], positions_1P, mask, None, fp32_attention, cache))
        return cache

    def _decode(
        self,
        embeds_BLH: Tensor,
        positions_BL: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        kernel: Kernel | None,
        fp32_attention: bool,
        cache: PrefixCache | None = None,
    ) -> Tensor:
        if cache is not None and self.base.training and is_checkpointing(self.base):
            raise ValueError("gradient checkpointing takes no cache of a prefix in training: evaluate with eval()")
        options: dict[str, Any] = {"kernel": kernel, "fp32_attention": fp32_attention} if self.takes_kernels else {}
        out = self.base.get_decoder()(
            inputs_embeds=embeds_BLH,
            position_ids=positions_BL,
            attention_mask=placeholder(embeds_BLH.device) if kernel is not None else mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )
        return out.last_hidden_state

    def _packed_kernel(self, row: PackedRow, fp32_attention: bool, dtype: torch.dtype) -> Kernel | None:
        """What attends in a packed row; None: the mask of the whole row."""
        if self.attention in MASKED or not self.takes_kernels:
            return None
        if not self._within_window(row.prefix + row.longest):
            self._log_once("samples longer than the layers' sliding window attend by a mask of the whole row")
            return None
        backend = self.attention
        if backend in CAUSAL_ONLY and row.nodes:
            self._log_once(f"{backend} takes no answer trie: scoring uses blocks")
            backend = "blocks"
        elif backend in CAUSAL_ONLY and fp32_attention and dtype in HALF:
            self._log_once(
                f"{backend} does not compute half precision in float32: where that is needed blocks are used"
            )
            backend = "blocks"
        return row.kernel(backend)

    def _within_window(self, length: int) -> bool:
        """Whether no layer's sliding window is shorter than a sample of this length."""
        window = getattr(self.base.config, "sliding_window", None)
        return not window or length <= window

    def _log_once(self, what: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            log.info("attention: %s", what)

    def step(self, embeds_BLH: Tensor, positions_BL: Tensor, seen_BS: Tensor, cache: DynamicCache) -> Tensor:
        """Hidden states `[B, L, H]` of positions that continue those in `cache`, which grows by them.

        `seen_BS` covers the cache and the new positions: false on padding.
        """
        self.limits.check_positions(seen_BS.shape[1])
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

    @property
    def reads_rows(self) -> bool:
        """Whether :meth:`token_logits` reads the head's rows of these tokens alone: where the head is a plain layer, and whole."""
        head: Any = self.base.get_output_embeddings()
        return type(head) is nn.Linear and not is_partitioned(head.weight)

    def token_logits(self, hidden: Tensor, token_m: Tensor) -> Tensor:
        """Logits `[..., m]` of some tokens, float32: those of :meth:`logits`, but for rounding in half precision."""
        if not self.reads_rows:
            return self.logits(hidden)[..., token_m].float()
        head: Any = self.base.get_output_embeddings()
        bias = None if head.bias is None else head.bias[token_m].float()
        logits = nn.functional.linear(hidden.float(), head.weight[token_m].float(), bias)
        return logits if self._scale_logits is None else self._scale_logits(logits)

    def _layer_masks(
        self, mask_B1QK: Tensor, query_BQ: Tensor, key_BK: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """The mask as the decoder takes it: narrowed to the window of layers that have one (positions of queries and
        keys), and for eager attention as what is added to its scores in `dtype`."""
        config = self.base.config
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
        masks = {"full_attention": mask_B1QK}
        if window and "sliding_attention" in kinds:
            near_B1QK = (query_BQ[:, None, :, None] - key_BK[:, None, None, :]) < window
            masks["sliding_attention"] = mask_B1QK & near_B1QK
        if config._attn_implementation == "eager":
            masks = {
                k: torch.zeros_like(m, dtype=dtype).masked_fill(~m, torch.finfo(dtype).min) for k, m in masks.items()
            }
        if getattr(config, "layer_types", None) and len(masks) > 1:
            return masks
        return masks[kinds.pop() if len(masks) > 1 else "full_attention"]

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
        """As in `nn.Module`, but a cast (DeepSpeed's to bf16) leaves float buffers as they are: rotary frequencies need float32."""
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
    ranks: Ranks | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Backbone:
    """Load, quantise, adapt and check a backbone; `folder` holds the tiny one (name 'tiny'), `tokenizer` stands for its own.

    With `zero3`, DeepSpeed's JSON, each rank keeps its part of every pretrained weight. All `ranks` (default: this
    process only) call this together.

    At the end a few tokens go through it, whole and as packed rows, and must agree: a family whose logits are computed
    by steps that are not reproduced here, or whose layers cannot attend to packed rows, is refused by name. Rows beyond a
    family's :class:`trainer.models.backbone.limits.RowLimits` are refused when they come, the longest before the first step.

    Raises:
        ValueError: with what is wrong and what to do.
    """
    device = torch.device(device)
    usable = resolve_attention(config.attention, device, dtype)
    asked_of_family = {"auto": None, "eager": "eager"}.get(config.attention, "sdpa")
    tokenizer = tokenizer or load_tokenizer(config, folder)
    ranks = ranks or SingleProcess()
    loaded = load_model(config, dtype, device, asked_of_family, folder, zero3, ranks)
    attention = str(loaded.model.config._attn_implementation)
    backbone = adapted_backbone(loaded.model, tokenizer, attention, config, adapter, dtype).to(device)
    if config.gradient_checkpointing and torch.device(device).type == "cpu":
        log.info(
            "gradient checkpointing computes every layer twice: where memory allows, "
            "model.backbone.gradient_checkpointing=false is 1.4 times as fast on a CPU"
        )
    if len(tokenizer) > backbone.vocabulary:
        raise BackboneError(
            f"{config.name}: its tokenizer has {len(tokenizer)} tokens, the model only {backbone.vocabulary}"
        )
    backbone.embedding_norm = loaded.embedding_norm(len(tokenizer))
    frozen = [(name, loaded.measured[name]) for name in _frozen(backbone)]
    exact = config.quantization == "none" or not config.double_quantization
    backbone.fingerprints = BaseFingerprint(source_fingerprint(frozen), fingerprint(frozen), exact)
    _check_same_base(config.name, backbone.fingerprints, ranks)
    backbone.limits = row_limits(
        backbone.base,
        lambda twin: Backbone(twin, tokenizer, str(twin.config._attn_implementation)),
        config.trust_remote_code,
    )
    with gathered_by_layer(backbone):
        choose_attention(backbone, config.attention, usable, config.name)
    backbone.train()
    return backbone


def adapted_backbone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attention: str,
    config: BackboneConfig,
    adapter: AdapterConfig,
    dtype: torch.dtype,
) -> Backbone:
    """A language model, with weights or of shapes only, with its adapter and its checkpointing of activations."""
    backbone = Backbone(adapt(model, adapter, dtype), tokenizer, attention)
    if config.gradient_checkpointing:
        set_checkpointing(backbone.base, on=True, reentrant=config.reentrant)
        if config.reentrant:  # reentrant checkpointing needs an input that requires a gradient, or the layers get none
            backbone.base.enable_input_require_grads()
    return backbone


def base_fingerprint(backbone: Backbone) -> str:
    """sha256 over all frozen weights as they are stored: names, dtypes, shapes, bytes; of 4-bit weights the packed bytes
    and their scales too. Any changed bit changes it.

    It is the same with and without LoRA, and differs between dtypes. Of doubly quantised weights it may differ between numbers of threads and
    devices (:class:`trainer.models.backbone.fingerprint.BaseFingerprint`). Weights must be whole: of those that ZeRO-3 partitioned the
    loader made it (`Backbone.fingerprints.stored`). About 1 s per GB and core, tensors in parallel.
    """
    frozen = _frozen(backbone)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        measured = pool.map(measure, frozen.values())
    return fingerprint(zip(frozen, measured, strict=True))


def _frozen(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The weights that are not trained, by the names they have without LoRA."""
    parameters = backbone.base.named_parameters()
    return {n.replace(".base_layer.", "."): p for n, p in parameters if not p.requires_grad and "lora_" not in n}


def _check_same_base(name: str, own: BaseFingerprint, ranks: Ranks) -> None:
    """Every rank must have read the same weights; `own` are the fingerprints of those that this one read.

    Raises:
        BackboneError: some read others, with the ranks.
    """
    everyone = ranks.gather_all(own)
    differing = [str(rank) for rank, found in enumerate(everyone) if found.source != everyone[0].source]
    if differing:
        raise BackboneError(
            f"{name}: rank {', '.join(differing)} read other weights than rank 0: the files differ between nodes, or changed "
            "while they were read. Bring the same to all, or use model.backbone.read=rank0"
        )
    rounded = [str(rank) for rank, found in enumerate(everyone) if found.stored != everyone[0].stored]
    if rounded and ranks.is_rank_zero:
        log.warning(
            "%s: rank %s rounded the scales of 4-bit weights in another way than rank 0, from the same weights: other devices or numbers of "
            "threads do so. The ranks' frozen weights differ in last bits",
            name,
            ", ".join(rounded),
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
