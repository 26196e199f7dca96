"""Attention of packed rows: a prefix that every sample sees, samples that do not see each other.

Shapes: B samples, P prefix tokens, T tokens of a row's samples (R = P + T with the prefix, T where a cache holds it), L
tokens of the longest sample, S = P + L, Q and K rows of a mask, N nodes of an answer trie, H heads of queries, h heads of
keys and values (H = h x g), d width of a head. Attention functions get `[1, H, R, d]` and give `[1, R, H, d]`, as in
transformers.

Four backends give the same numbers. `mask`: one boolean mask over the whole row. `blocks`: every sample padded to the longest,
its keys behind a copy of the prefix's; only attention is padded. `varlen`: nothing is padded, kernels for sequences of
unequal length take as keys of a sample the prefix and its own (`cu_seqlens_q` differs from `cu_seqlens_k`, causality aligned
bottom right), and the prefix is one more sequence. `flex`: the mask as a rule, compiled.

transformers hands keyword arguments of the decoder on to the attention function that a model's configuration names, and
gradient checkpointing recomputes with the same ones. :func:`attend` is that function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.batch import Packing

NAME = "egmf_attention"  # of :func:`attend`, in transformers' registry
HALF = (torch.bfloat16, torch.float16)
MASKED = ("sdpa", "eager")  # the backends that take the mask of a whole row
CAUSAL_ONLY = ("flash_attention_2", "varlen", "flex")  # no answer trie, and half precision as it is
FLEX_SHAPES = 64  # that flex attention may be compiled for
FLEX_BLOCK = 128  # torch's own; rows padded to it have few shapes, each of which is compiled


class Kernel(Protocol):
    """Attention of one row or batch: `[1, H, R, d]` queries, `[1, h, K, d]` keys and values -> `[1, R, H, d]`."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor: ...


def install(model: PreTrainedModel) -> None:
    """Let a model that attends through sdpa do so through :func:`attend`: without a kernel the two are the same."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        config._attn_implementation = NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kernel: Kernel | None = None,
    fp32_attention: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention by `kernel`, or by sdpa with the mask; `fp32_attention`: half precision is computed in float32.

    Raises:
        ValueError: the layer asks for something that kernels here do not do.
    """
    dtype = query.dtype
    if fp32_attention and dtype in HALF:
        query, key, value = query.float(), key.float(), value.float()
    if kernel is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out.to(dtype), None
    special = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if special:
        raise ValueError(f"attention with {', '.join(special)} is known to no kernel of packed rows")
    return kernel(query, key, value, scale=scaling, dropout=dropout).to(dtype), None


def placeholder(device: torch.device) -> Tensor:
    """What is given as the mask where a kernel needs none: transformers builds no other then, and a layer that loses the
    kernel on its way fails on it instead of attending to everything."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
    """Every position sees the ones before it, in every row of the batch."""
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scale, is_causal=query.shape[2] > 1, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def causal_flash(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
    """:func:`causal` by flash-attn."""
    flash: Any = importlib.import_module("flash_attn")
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    out: Tensor = flash.flash_attn_func(
        query, key, value, dropout_p=dropout, softmax_scale=scale, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, layer by layer; once filled, what attends behind it leaves it as it is."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.filled = length == 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The layer's keys and values with these behind them."""
        if not self.filled:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self.length:
            return key_states, value_states
        cached: Any = self.layers[layer_idx]
        return torch.cat([cached.keys, key_states], 2), torch.cat([cached.values, value_states], 2)

    def fill(self, run: Callable[[], Any]) -> None:
        """Store what passes while `run` runs.

        Raises:
            ValueError: the model stored nothing, or not the whole prefix.
        """
        run()
        layers: list[Any] = self.layers
        cached = {layer.get_seq_length() for layer in layers}
        if cached != {self.length}:
            raise ValueError(f"the model's layers stored {sorted(cached) or 'no'} of {self.length} prefix tokens")
        self.filled = True


class _Take(torch.autograd.Function):
    """:func:`take`; PyTorch's own gradient would add where it can copy, which takes long on a CPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = values.shape[0]
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return whole.index_copy_(0, index, gradient), None


def take(values: Tensor, index: Tensor) -> Tensor:
    """The rows `index` of `values`, none of them twice."""
    return _Take.apply(values, index)


class PackedRow:
    """Where everything stands in one packed row, as tensors on its device; no host waits for a device here.

    `positions_R`: the tokens' positions. The row holds its prefix unless `cached`.
    """

    def __init__(self, packing: Packing, cached: bool = False) -> None:
        length_B = packing.length_B
        device = length_B.device
        self.packing, self.device = packing, device
        self.prefix, self.longest, self.total = packing.prefix, packing.longest, packing.total
        self.samples = length_B.shape[0]
        self.own_prefix = 0 if cached else packing.prefix  # prefix tokens that are in the row
        start_B = length_B.cumsum(0) - length_B
        self.sample_T = torch.repeat_interleave(
            torch.arange(self.samples, device=device), length_B, output_size=self.total
        )
        self.offset_T = torch.arange(self.total, device=device) - start_B[self.sample_T]
        self.start_B = start_B
        self.nodes = 0 if packing.trie is None else packing.trie.token_N.shape[0]
        self.context_B = length_B - self.nodes
        self._block_masks: dict[int, Tensor] = {}  # by g: layers share them

    def kernel(self, backend: str) -> Kernel:
        """The attention of this row by its name in the configuration."""
        kernels: dict[str, Kernel] = {
            "blocks": self.blocks,
            "varlen": self.varlen,
            "flash_attention_2": self.flash,
            "flex": self.flex,
        }
        return kernels[backend]

    @cached_property
    def positions_R(self) -> Tensor:
        place_T = self.offset_T
        if self.packing.trie is not None and self.nodes:
            context_T = self.context_B[self.sample_T]
            node_T = place_T - context_T
            place_T = torch.where(node_T < 0, place_T, context_T + self.packing.trie.depth_N[node_T.clamp(min=0)])
        return torch.cat([torch.arange(self.own_prefix, device=self.device), self.prefix + place_T])

    @cached_property
    def key_positions_K(self) -> Tensor:
        """Positions of the keys: those of the row, behind a cached prefix."""
        return torch.cat([torch.arange(self.prefix - self.own_prefix, device=self.device), self.positions_R])

    def _sees_own(self, query: Tensor, key: Tensor, context: Tensor) -> Tensor:
        """Whether a sample's token at offset `query` sees its token at offset `key` (all broadcast)."""
        before = key <= query
        trie = self.packing.trie
        if trie is None or not self.nodes:
            return before
        last = self.nodes - 1
        node_query, node_key = query - context, key - context
        ancestor = trie.ancestors_NN[node_query.clamp(0, last), node_key.clamp(0, last)]
        return torch.where((node_query >= 0) & (node_key >= 0), ancestor, before)

    @cached_property
    def mask_RK(self) -> Tensor:
        """True where a token of the row sees a key of the row, or of the prefix in front of it."""
        P, T = self.prefix, self.total
        same_TT = self.sample_T[:, None] == self.sample_T
        context_T1 = self.context_B[self.sample_T][:, None]
        own_TT = same_TT & self._sees_own(self.offset_T[:, None], self.offset_T[None], context_T1)
        mask_TK = torch.cat([own_TT.new_ones(T, P), own_TT], 1)
        if not self.own_prefix:
            return mask_TK
        prefix_PK = torch.cat([own_TT.new_ones(P, P).tril(), own_TT.new_zeros(P, T)], 1)
        return torch.cat([prefix_PK, mask_TK])

    # blocks

    @cached_property
    def _place_T(self) -> Tensor:
        """Where each of the T tokens stands among the B x L places of the padded samples."""
        return self.sample_T * self.longest + self.offset_T

    def _block_mask(self, groups: int) -> Tensor:
        """`[B, 1, g x L, S]`: what the padded samples see. Padding sees something, or its softmax would be nan."""
        if groups in self._block_masks:
            return self._block_masks[groups]
        at_L = torch.arange(self.longest, device=self.device)
        query, key = at_L[None, :, None], at_L[None, None]
        length_B11, context_B11 = self.packing.length_B[:, None, None], self.context_B[:, None, None]
        own_BLL = self._sees_own(query, key, context_B11) & (key < length_B11)
        own_BLL = own_BLL | ((query >= length_B11) & (key == 0))
        prefix_BLP = own_BLL.new_ones(self.samples, self.longest, self.prefix)
        mask = torch.cat([prefix_BLP, own_BLL], 2).repeat(1, groups, 1)[:, None]
        self._block_masks[groups] = mask
        return mask

    def blocks(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """One batch of padded samples, and the prefix by itself. Query heads that share a key head stand behind one
        another as more queries of it, so that no key is copied for them."""
        B, L, P = self.samples, self.longest, self.prefix
        h, g = key.shape[1], query.shape[1] // key.shape[1]

        def padded(values_T: Tensor) -> Tensor:  # [T, heads, d] -> [B, L, heads, d]
            nothing = values_T.new_zeros(B * L, *values_T.shape[1:])
            return nothing.index_copy(0, self._place_T, values_T).unflatten(0, (B, L))

        def behind_prefix(values_1hKd: Tensor) -> Tensor:
            values_Khd = values_1hKd[0].transpose(0, 1)
            prefix = values_Khd[:P].expand(B, -1, -1, -1)
            return torch.cat([prefix, padded(values_Khd[P:])], 1).transpose(1, 2)

        query_BLHd = padded(query[0].transpose(0, 1)[self.own_prefix :])
        query_BhQd = query_BLHd.unflatten(2, (h, g)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out_BhQd = F.scaled_dot_product_attention(
            query_BhQd,
            behind_prefix(key),
            behind_prefix(value),
            attn_mask=self._block_mask(g),
            dropout_p=dropout,
            scale=scale,
        )
        out_BLHd = out_BhQd.unflatten(2, (g, L)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        out_THd = take(out_BLHd.flatten(0, 1), self._place_T)
        if not self.own_prefix:
            return out_THd[None]
        prefix = causal(query[:, :, :P], key[:, :, :P], value[:, :, :P], scale=scale, dropout=dropout)
        return torch.cat([prefix, out_THd[None]], 1)

    # varlen

    @cached_property
    def sequences(self) -> Sequences:
        """The prefix, where the row holds it, and every sample behind the prefix."""
        B, P, T, lead = self.samples, self.prefix, self.total, self.own_prefix
        sample_K = torch.repeat_interleave(
            torch.arange(B, device=self.device), P + self.packing.length_B, output_size=B * P + T
        )
        offset_K = (
            torch.arange(B * P + T, device=self.device)
            - (self.start_B + P * torch.arange(B, device=self.device))[sample_K]
        )
        shared_K = lead + sample_K * P + offset_K
        own_K = lead + B * P + self.start_B[sample_K] + offset_K - P
        order_K = torch.where(offset_K < P, shared_K, own_K)
        queries_B, keys_B = self.packing.length_B, self.packing.length_B + P
        if lead:
            order_K = torch.cat([torch.arange(lead, device=self.device), order_K])
            queries_B, keys_B = (F.pad(lengths, (1, 0), value=lead) for lengths in (queries_B, keys_B))
        cu_queries, cu_keys = (F.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in (queries_B, keys_B))
        return Sequences(order_K, cu_queries, cu_keys, max(lead, self.longest), P + self.longest)

    def _in_sequences(self, values_1hKd: Tensor) -> Tensor:
        """`[K, h, d]`: keys or values sequence by sequence. Copied by `expand` and put into order by an index without
        repetitions, so that gradients add up in one order on every device."""
        values_Khd, P = values_1hKd[0].transpose(0, 1), self.prefix
        shared = values_Khd[:P].expand(self.samples, -1, -1, -1).flatten(0, 1)
        every = torch.cat([values_Khd[: self.own_prefix], shared, values_Khd[P:]])
        return every.index_select(0, self.sequences.order_K)

    def _varlen(self, run: VarlenKernel, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        query_RHd = query[0].transpose(0, 1).contiguous()
        return run(query_RHd, self._in_sequences(key), self._in_sequences(value), self.sequences, **options)[None]

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """PyTorch's own kernel for unequal lengths; on a CPU sdpa, sequence by sequence."""
        run = varlen_torch if query.is_cuda else varlen_loop
        return self._varlen(run, query, key, value, scale=scale, dropout=dropout)

    def flash(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """flash-attn's kernel for unequal lengths."""
        return self._varlen(varlen_flash, query, key, value, scale=scale, dropout=dropout)

    # flex

    @cached_property
    def _flex_mask(self) -> Any:
        """The rule of the mask, for rows padded to whole blocks: what comes earlier in one's own sample or in the prefix."""
        from torch.nn.attention.flex_attention import create_block_mask

        P, behind = self.prefix, self.prefix - self.own_prefix  # cached keys come before the row's
        queries, keys = (_whole_blocks(n) for n in (self.own_prefix + self.total, P + self.total))
        sample_T = F.pad(self.sample_T, (P, 0), value=-1)
        sample_K = F.pad(sample_T, (0, max(keys, queries + behind) - sample_T.shape[0]), value=self.samples)

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = query + behind
            return (key <= at) & ((key < P) | (sample_K[key] == sample_K[at]))

        return create_block_mask(sees, None, None, queries, keys, device=self.device)

    def flex(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """The mask as a rule, compiled to a kernel that leaves out what nobody sees."""
        _refuse_dropout("flex", dropout)
        rows = query.shape[2]
        query, key, value = (F.pad(t, (0, 0, 0, _whole_blocks(t.shape[2]) - t.shape[2])) for t in (query, key, value))
        gqa = query.shape[1] != key.shape[1]
        out = _compiled_flex()(query, key, value, block_mask=self._flex_mask, scale=scale, enable_gqa=gqa)
        return out[:, :, :rows].transpose(1, 2)


class Sequences(NamedTuple):
    """Sequences of unequal length, one behind another: where each begins (int32, one more than sequences), the longest;
    `order_K` puts keys into their order (see :meth:`PackedRow._in_sequences`)."""

    order_K: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


class VarlenKernel(Protocol):
    """`[R, H, d]` queries, `[K, h, d]` keys and values of :class:`Sequences` -> `[R, H, d]`. The last query of a sequence
    sees all its keys, each one before it one key less."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, scale: float | None, dropout: float
    ) -> Tensor: ...


def varlen_loop(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, scale: float | None, dropout: float
) -> Tensor:
    """One sequence after another through sdpa: what the fast kernels must equal. It waits for the device."""
    queries, keys = sequences.cu_queries.tolist(), sequences.cu_keys.tolist()
    parts = []
    for at, stop, key_at, key_stop in zip(queries, queries[1:], keys, keys[1:], strict=False):
        q, k, v = query[at:stop], key[key_at:key_stop], value[key_at:key_stop]
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale, enable_gqa=gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_torch(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, scale: float | None, dropout: float
) -> Tensor:
    """PyTorch's kernel, for CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_dropout("varlen", dropout)
    _, cu_queries, cu_keys, longest_queries, longest_keys = sequences
    out: Any = varlen_attn(
        query, key, value, cu_queries, cu_keys, longest_queries, longest_keys,
        scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out


def varlen_flash(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, scale: float | None, dropout: float
) -> Tensor:
    """flash-attn's kernel."""
    flash: Any = importlib.import_module("flash_attn")
    _, cu_queries, cu_keys, longest_queries, longest_keys = sequences
    out: Tensor = flash.flash_attn_varlen_func(
        query, key, value, cu_queries, cu_keys, longest_queries, longest_keys,
        dropout_p=dropout, softmax_scale=scale, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


@cache
def _compiled_flex() -> Any:
    """Compiled for a few shapes at most, since rows are whole blocks. As one whole graph: else torch would go on without the kernel
    after some recompilations; and with room for more of them than torch's 8, beyond which a whole graph is an error."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = max(config.recompile_limit, FLEX_SHAPES)
    return torch.compile(flex_attention, fullgraph=True)


def _whole_blocks(length: int) -> int:
    return -(-length // FLEX_BLOCK) * FLEX_BLOCK


def _refuse_dropout(backend: str, dropout: float) -> None:
    if dropout:
        raise ValueError(
            f"attention={backend} has no dropout, and the model drops {dropout:g} of its attention: use blocks"
        )
