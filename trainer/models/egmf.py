"""EGMF: pseudo tokens of the fusion network inside a prompt, read by the backbone, which answers in words.

Source: EGMF, arXiv 2601.07565; the loss and the scores as DESIGN says.
Shapes: B samples, L positions of a padded row, T own tokens of a packed row, H backbone hidden size, K pseudo tokens, A
answer tokens, n answer tokens of all samples, V vocabulary, N nodes of the answer trie, C answers, E experts, M modalities,
P = N + 1 places that predict a token of the trie, r some of all places, m tokens of the trie and its end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.batch import AnswerTrie, Batch, FusionInput, PackedBatch
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.packed import PrefixCache, take
from trainer.models.fusion.heads import expert_losses
from trainer.models.fusion.network import Fusion, FusionOutput
from trainer.models.losses import expected_error, token_nll
from trainer.text import end_token

LOGITS_AT_ONCE = 2**25  # entries of [B x P, V] held at a time in scoring


class LossOutput(NamedTuple):
    """Per-sample losses, unweighted, float32: `loss_B` = -sum log p of the answer's tokens, end included (smoothed, and with
    an expected error, where the batch asks for it); `auxiliary_B` are the fusion network's own terms, already times their
    weights: the gate's balance, the experts' answers, the gate's trust in them. `unused_param_zero` is 0 and belongs in the sum, so that every parameter has a gradient."""

    loss_B: Tensor
    auxiliary_B: Tensor
    unused_param_zero: Tensor
    gate_expert_BKE: Tensor | None
    gate_modality_BKEM: Tensor | None


class ScoreOutput(NamedTuple):
    """`logprob_BC`: log p of every answer with its end token, float32, not normalised over the answers."""

    logprob_BC: Tensor
    gate_expert_BKE: Tensor | None
    gate_modality_BKEM: Tensor | None


class EGMF(nn.Module):
    """The fusion network before the backbone; without it (K = 0) the backbone alone, a text-only model."""

    def __init__(self, backbone: Backbone, fusion: Fusion | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusion = fusion
        self.end = end_token(backbone.tokenizer)

    def forward(
        self, batch: Batch | PackedBatch, trie: AnswerTrie | None = None, prefix: PrefixCache | None = None
    ) -> LossOutput | ScoreOutput:
        """With a trie the log-probability of each of its answers, else the loss of the batch's own answers.

        A packed batch without answers is scored over the trie it was packed with. `prefix`, of :meth:`prefix`, stands for its prefix.
        """
        if isinstance(batch, PackedBatch):
            own_TH, fused = self._embed_packed(batch)
            score = batch.packing.trie is not None and not batch.longest_answer
            hidden_TH = self._hidden_packed(own_TH, batch, prefix, fp32_attention=score)
            out = self._score_packed(hidden_TH, batch) if score else self._loss_packed(hidden_TH, batch)
        else:
            embeds_BLH, fused = self._embed(batch)
            score = trie is not None
            held = trie if score else batch.trie
            hidden_BLH = self._hidden_padded(embeds_BLH, batch, held, fp32_attention=score)
            out = self._score(hidden_BLH, batch, trie) if trie is not None else self._loss(hidden_BLH, batch)
        gates = (None, None) if fused is None else (fused.gate_expert_BKE, fused.gate_modality_BKEM)
        if score:
            return ScoreOutput(out, *gates)
        if fused is None or self.fusion is None:
            return LossOutput(out, torch.zeros_like(out), out.new_zeros(()), *gates)
        gate = self.fusion.gate
        auxiliary_B = gate.config.balance_weight * gate.balance_loss(fused.gate_expert_BKE).float()
        if fused.expert_logprob_BEC is not None:
            assert batch.answer_B is not None
            terms = expert_losses(
                fused.expert_logprob_BEC, batch.answer_B, fused.gate_expert_BKE, fused.expert_valid_BE
            )
            auxiliary_B = auxiliary_B + self.fusion.config.expert_loss_weight * (terms[0] + terms[1])
        if self.training:
            gate.accumulate(fused.gate_expert_BKE.detach(), batch.weight_B)
        return LossOutput(out, auxiliary_B, fused.unused_param_zero.float(), *gates)

    @torch.no_grad()
    def prefix(self, ids_P: Tensor) -> PrefixCache:
        """The keys and values of a task's prefix, for packed batches that are scored; the weights must not change."""
        was_training = self.training
        self.eval()
        try:
            return self.backbone.prefix(self.backbone.embed(ids_P), fp32_attention=True)
        finally:
            self.train(was_training)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        """The most likely text after each context, token by token until the end token; what came, uncleaned.

        Dropout is off. With several processes every one makes all `max_new_tokens` steps (ZeRO-3 needs equal calls).
        """
        was_training = self.training
        self.eval()
        try:
            return self._generate(batch, max_new_tokens)
        finally:
            self.train(was_training)

    def parameter_groups(self, fusion_lr: float, backbone_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer: fusion and backbone, each with and without weight decay.

        Only matrices of layers decay: no norms, biases, embeddings, slots. Groups are named and never empty.
        """
        groups: dict[str, dict[str, Any]] = {}
        for (
            name,
            parameter,
        ) in self.named_parameters():  # a weight shared by embedding and head comes once, as embedding
            if not parameter.requires_grad:
                continue
            owner, _, leaf = name.rpartition(".")
            part = name.partition(".")[0]
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            layer = not isinstance(self.get_submodule(owner), nn.Embedding) and (part != "fusion" or "weight" in leaf)
            decay = weight_decay if matrix and layer else 0.0
            group = groups.setdefault(
                part if matrix and layer else f"{part}-nodecay",
                {"params": [], "lr": fusion_lr if part == "fusion" else backbone_lr, "weight_decay": decay},
            )
            group["params"].append(parameter)
        return [{"name": name, **group} for name, group in sorted(groups.items())]

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: trainable parameters and the fusion network's buffers (its usage).

        The tensors are the live ones: clone to keep them. Shared weights appear once.
        """
        state = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        if self.fusion is not None:
            state |= {f"fusion.{name}": value for name, value in self.fusion.state_dict().items()}
        return state

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`trainable_state` gave; dtypes may differ, names and shapes may not.

        Raises:
            ValueError: with all names that are missing, unknown or of another shape; nothing is changed then.
        """
        own = self.trainable_state()
        faults = [f"missing: {name}" for name in own.keys() - state.keys()]
        faults += [f"not of this model: {name}" for name in state.keys() - own.keys()]
        faults += [
            f"another shape: {name} is {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
        if faults:
            faults.sort()
            shown = [f"  {fault}" for fault in faults[:10]] + (
                [f"  … {len(faults)} in all"] if len(faults) > 10 else []
            )
            raise ValueError(
                "these trained weights do not belong to this model (other adapter, fusion or task?):\n"
                + "\n".join(shown)
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _embed(self, batch: Batch) -> tuple[Tensor, FusionOutput | None]:
        embeds_BLH = self.backbone.embed(batch.input_ids_BL)
        fused = self._fuse(batch)
        if fused is None:
            return embeds_BLH, None
        start, stop = batch.pseudo_start, batch.pseudo_start + batch.pseudo_tokens
        pseudo_BKH = fused.pseudo_BKH.to(embeds_BLH.dtype)
        return torch.cat([embeds_BLH[:, :start], pseudo_BKH, embeds_BLH[:, stop:]], 1), fused

    def _embed_packed(self, batch: PackedBatch) -> tuple[Tensor, FusionOutput | None]:
        own_TH = self.backbone.embed(batch.own_ids_T)
        fused = self._fuse(batch)
        if fused is None:
            return own_TH, None
        pseudo_nH = fused.pseudo_BKH.flatten(0, 1).to(own_TH.dtype)
        return own_TH.index_copy(0, batch.place_BK.flatten(), pseudo_nH), fused

    def _fuse(self, batch: Batch | PackedBatch) -> FusionOutput | None:
        """The fusion network's output for all samples, group by group."""
        if self.fusion is None:
            if batch.pseudo_tokens:
                raise ValueError(
                    f"the batch keeps {batch.pseudo_tokens} places for pseudo tokens, the model makes none"
                )
            return None
        made = [self._fuse_group(self.fusion, batch.task, group) for group in batch.inputs]
        used = [out for out, group in zip(made, batch.inputs, strict=True) if not group.dummy]
        unused_param_zero = torch.stack([out.unused_param_zero.float() for out in used]).sum()
        for out, group in zip(made, batch.inputs, strict=True):
            if group.dummy:
                unused_param_zero = unused_param_zero + 0.0 * (
                    out.pseudo_BKH.float().sum() + out.unused_param_zero.float()
                )
                if out.expert_logprob_BEC is not None:
                    unused_param_zero = unused_param_zero + 0.0 * out.expert_logprob_BEC.sum()
        built = used[0].pseudo_BKH.shape[1]
        if built != batch.pseudo_tokens:
            raise ValueError(f"the batch keeps {batch.pseudo_tokens} places for pseudo tokens, the model makes {built}")
        if len(used) == 1:
            return used[0]._replace(unused_param_zero=unused_param_zero)
        told = [out.expert_logprob_BEC for out in used if out.expert_logprob_BEC is not None]
        return FusionOutput(
            torch.cat([out.pseudo_BKH for out in used]),
            torch.cat([out.gate_expert_BKE for out in used]),
            torch.cat([out.gate_modality_BKEM for out in used]),
            unused_param_zero,
            torch.cat([out.expert_valid_BE for out in used]),
            torch.cat(told) if told else None,
        )

    def _fuse_group(self, fusion: Fusion, task: str, group: FusionInput) -> FusionOutput:
        text_BSH = self.backbone.embed(group.text_ids_BS).detach()
        return fusion(task, text_BSH, group.text_mask_BS, group.audio, group.video)

    def _hidden_packed(
        self, own_TH: Tensor, batch: PackedBatch, prefix: PrefixCache | None, *, fp32_attention: bool
    ) -> Tensor:
        """Hidden states of the samples' own tokens."""
        if prefix is not None:
            return self.backbone.packed(own_TH, batch.packing, prefix, fp32_attention=fp32_attention)
        embeds_TH = torch.cat([self.backbone.embed(batch.prefix_ids_P), own_TH])
        return self.backbone.packed(embeds_TH, batch.packing, fp32_attention=fp32_attention)[batch.packing.prefix :]

    def _loss_packed(self, hidden_TH: Tensor, batch: PackedBatch) -> Tensor:
        if not len(batch.answer_at_n):
            raise ValueError("a batch without answers has no loss: pack it without a trie")
        logits_nV = self.backbone.logits(take(hidden_TH, batch.answer_at_n)).float()
        nll_n = token_nll(logits_nV, batch.answer_id_n, batch.choices)
        nll_m = nll_n.new_zeros(len(batch) * batch.longest_answer).index_copy(0, batch.answer_slot_n, nll_n)
        loss_B = nll_m.view(len(batch), -1).sum(1)
        if not batch.error_weight:
            return loss_B
        return loss_B + self._error(self._score_packed(hidden_TH, batch), batch, batch.packing.trie)

    def _score_packed(self, hidden_TH: Tensor, batch: PackedBatch) -> Tensor:
        trie = batch.packing.trie
        assert trie is not None
        places_P = torch.arange(trie.token_N.shape[0] + 1, device=hidden_TH.device)
        at_BP = batch.cue_at_B[:, None] + places_P
        hidden_BPH = hidden_TH.index_select(0, at_BP.flatten()).unflatten(0, tuple(at_BP.shape))
        return self._answer_logprobs(hidden_BPH, trie)

    def _hidden_padded(
        self, embeds_BLH: Tensor, batch: Batch, trie: AnswerTrie | None, *, fp32_attention: bool
    ) -> Tensor:
        """Hidden states of padded rows, and behind them of the trie; each node sees its row's context and its ancestors."""
        B, L, _ = embeds_BLH.shape
        device = embeds_BLH.device
        if trie is None:
            return self.backbone.hidden(embeds_BLH, _arange(B, L, device))
        nodes_BNH = self.backbone.embed(trie.token_N)[None].expand(B, trie.token_N.shape[0], -1)
        positions_BL = torch.cat([_arange(B, L, device), batch.context_length_B[:, None] + trie.depth_N], 1)
        mask_B1LL = _trie_mask(batch.context_length_B, L, trie)
        return self.backbone.hidden(
            torch.cat([embeds_BLH, nodes_BNH], 1), positions_BL, mask_B1LL, fp32_attention=fp32_attention
        )

    def _loss(self, hidden_BLH: Tensor, batch: Batch) -> Tensor:
        B, A = batch.answer_ids_BA.shape
        if A == 0:
            raise ValueError("a batch without answers has no loss: collate it with answers=True, or give a trie")
        at_BA = batch.context_length_B[:, None] - 1 + torch.arange(A, device=hidden_BLH.device)
        at_BA = at_BA.clamp(max=batch.input_ids_BL.shape[1] - 1)
        logits_BAV = self.backbone.logits(_gather(hidden_BLH, at_BA)).float()
        nll_n = token_nll(logits_BAV.flatten(0, 1), batch.answer_ids_BA.flatten(), batch.choices)
        loss_B = torch.where(batch.answer_mask_BA, nll_n.view(B, A), 0.0).sum(1)
        if batch.trie is None:
            return loss_B
        return loss_B + self._error(self._score(hidden_BLH, batch, batch.trie), batch, batch.trie)

    def _score(self, hidden_BLH: Tensor, batch: Batch, trie: AnswerTrie) -> Tensor:
        B, N = len(batch), trie.token_N.shape[0]
        nodes_BN = (batch.input_ids_BL.shape[1] + torch.arange(N, device=hidden_BLH.device)).expand(B, N)
        hidden_BPH = _gather(hidden_BLH, torch.cat([batch.context_length_B[:, None] - 1, nodes_BN], 1))
        return self._answer_logprobs(hidden_BPH, trie)

    def _error(self, logprob_BC: Tensor, batch: Batch | PackedBatch, trie: AnswerTrie | None) -> Tensor:
        """What the expected absolute error adds to the losses."""
        assert trie is not None
        assert trie.value_C is not None
        return batch.error_weight * expected_error(logprob_BC, trie.value_C, batch.target_B)

    def _answer_logprobs(self, hidden_BPH: Tensor, trie: AnswerTrie) -> Tensor:
        """log p of every answer `[B, C]` from the hidden states at the cue's end and at the nodes."""
        B, P, _ = hidden_BPH.shape
        next_m = torch.cat([trie.token_N, trie.token_N.new_tensor([trie.end])])

        def next_logprobs(hidden_rH: Tensor) -> Tensor:
            logits_rV = self.backbone.logits(hidden_rH).float()
            # in float64: sums reach -50 and below
            return logits_rV[:, next_m].double() - logits_rV.logsumexp(-1, keepdim=True).double()

        rows = []
        for hidden_rH in hidden_BPH.flatten(0, 1).tensor_split(self._parts(B * P)):
            if torch.is_grad_enabled():  # logits are made again for the gradient: all of them at once would be too many
                rows.append(checkpoint(next_logprobs, hidden_rH, use_reentrant=False, preserve_rng_state=False))
            else:
                rows.append(next_logprobs(hidden_rH))
        logprob_BPm = torch.cat(rows).unflatten(0, (B, P))
        from_N = trie.parent_N + 1  # the place that predicts a node: 0 is the cue's end
        node_BN = logprob_BPm[:, from_N, torch.arange(P - 1, device=from_N.device)]
        end_BP = logprob_BPm[..., -1]
        total_BP = torch.zeros_like(end_BP)
        for depth in range(int(trie.depth_N.max()) + 1):
            at_n = (trie.depth_N == depth).nonzero()[:, 0]
            total_BP[:, at_n + 1] = total_BP[:, from_N[at_n]] + node_BN[:, at_n]
        return (total_BP + end_BP)[:, trie.leaf_C + 1].float()

    def _parts(self, rows: int) -> int:
        """In how many parts the logits of so many rows are made. With several processes it is the same number on all of
        them: under ZeRO-3 each part gathers the head's weights."""
        parts = max(1, -(-rows * self.backbone.vocabulary // LOGITS_AT_ONCE))
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            most = torch.tensor(parts, device=self.backbone.base.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            return int(most)
        return parts

    def _generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        embeds_BLH, _ = self._embed(batch)
        B, L, _ = embeds_BLH.shape
        device = embeds_BLH.device
        from_BL = torch.arange(L, device=device) - (L - batch.context_length_B[:, None])  # rows shifted to end together
        seen_BL = from_BL >= 0
        positions_BL = from_BL.clamp(min=0)
        cache = self.backbone.new_cache()
        hidden_BLH = self.backbone.step(_gather(embeds_BLH, positions_BL), positions_BL, seen_BL, cache)
        position_B1 = batch.context_length_B[:, None]
        told = torch.full((B, max_new_tokens), self.end, device=device)
        done_B = torch.zeros(B, dtype=torch.bool, device=device)
        together = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        for step in range(max_new_tokens):
            token_B = self.backbone.logits(hidden_BLH[:, -1]).argmax(-1).masked_fill(done_B, self.end)
            told[:, step] = token_B
            done_B |= token_B == self.end
            if step + 1 == max_new_tokens or (not together and bool(done_B.all())):
                break
            seen_BL = torch.cat([seen_BL, seen_BL.new_ones(B, 1)], 1)
            hidden_BLH = self.backbone.step(self.backbone.embed(token_B[:, None]), position_B1 + step, seen_BL, cache)
        texts = []
        for row in told.tolist():
            kept = row[: row.index(self.end)] if self.end in row else row
            texts.append(str(self.backbone.tokenizer.decode(kept, clean_up_tokenization_spaces=False)))
        return texts


def _trie_mask(context_length_B: Tensor, length: int, trie: AnswerTrie) -> Tensor:
    """`[B, 1, L + N, L + N]`: contexts causal, nodes see their row's unpadded context and their ancestors."""
    B, N = context_length_B.shape[0], trie.token_N.shape[0]
    device = context_length_B.device
    mask = torch.zeros(B, 1, length + N, length + N, dtype=torch.bool, device=device)
    mask[:, :, :length, :length] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:, :, length:, :length] = (torch.arange(length, device=device) < context_length_B[:, None])[:, None, None]
    mask[:, :, length:, length:] = trie.ancestors_NN
    return mask


def _gather(values_BLH: Tensor, at_BA: Tensor) -> Tensor:
    """`[B, A, H]`: the positions `at_BA` of every row."""
    return values_BLH.gather(1, at_BA[..., None].expand(-1, -1, values_BLH.shape[2]))


def _arange(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device).expand(rows, length)
